"""What the engine asks of a model. Two are real: `llama` (llama.cpp) and `toy`."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from headstart.messages import ModelInfo, Sampling


@dataclass(frozen=True, slots=True)
class Piece:
    """`tokens` to evaluate at positions `start`... of sequence `seq`; `sample`: the last one's logits are
    wanted."""

    seq: int
    start: int
    tokens: Seq[int]
    sample: bool


class ModelError(Exception):
    """A model could not be loaded or could not evaluate a batch."""


class Sampler(Protocol):
    """Chooses tokens for one sequence; remembers what it chose, for penalties and the random stream."""

    def close(self) -> None: ...


class Model(Protocol):
    """A loaded model with room for `info.slots` sequences, numbered from 0, each of `info.n_ctx` tokens.

    After a failed `evaluate` the sequences of its pieces hold unknown values and must be cleared.
    """

    info: ModelInfo

    def evaluate(self, pieces: Seq[Piece]) -> None:
        """Computes the KV values of all pieces in one batch. Raises ModelError."""

    def sampler(self, sampling: Sampling, history: Seq[int]) -> Sampler:
        """A sampler for a sequence whose prompt is `history`."""

    def sample(self, row: int, sampler: Sampler) -> int:
        """The next token of piece number `row` of the last `evaluate`, which must have said `sample`."""

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""

    def clear(self, seq: int) -> None:
        """Forgets the sequence."""

    def cut(self, seq: int, n_tokens: int) -> bool:
        """Keeps the first `n_tokens` tokens only; False, leaving unknown values, where that can't be done."""

    def save(self, seq: int) -> memoryview:
        """A copy of the sequence's state. Raises ModelError."""

    def restore(self, seq: int, state: memoryview) -> bool:
        """Fills a cleared sequence from a saved state; False, leaving unknown values, if it doesn't fit."""
