"""What the engine asks of a model. Two are real: `llama` (llama.cpp) and `toy`."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from headstart.engine.grammar import Grammars, Matcher
from headstart.engine.logprobs import Logprobs
from headstart.protocol import ModelInfo, Sampling

# Room in a step for the prompt tokens of several short prompts, however small the chunks are.
LEAST_STEP_TOKENS = 96


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


class TooLarge(ModelError):
    """A model would take more memory than is available."""


class Sampler(Protocol):
    """Chooses tokens for one sequence; remembers what it chose, for penalties and the random stream.
    `ended`: what it chose is complete by its grammar, and nothing may follow."""

    @property
    def ended(self) -> bool: ...

    def close(self) -> None: ...


class Embedder(Protocol):
    """Makes embeddings, one at a time, in memory of its own. `whole`: an input can't be evaluated in
    pieces."""

    whole: bool

    def clear(self) -> None:
        """Forgets what was evaluated; must have been called before another input, and after a failure."""

    def evaluate(self, start: int, tokens: Seq[int]) -> None:
        """Evaluates the input's tokens from position `start` on. Raises ModelError."""

    def vector(self) -> bytes:
        """The embedding of what was evaluated: float32, little-endian, of length 1. Raises ModelError where
        there is none."""


class Model(Protocol):
    """A loaded model with room for `info.slots` sequences of `info.n_ctx` tokens, numbered from 0, each with
    a KV stream of its own. Where `info.pool_tokens` is not 0 there is also a pool: that many KV cells shared
    by sequences numbered from `info.slots`, as many as there are slots and one more.

    After a failed `evaluate` the sequences of its pieces hold unknown values and must be cleared.
    """

    info: ModelInfo
    grammars: Grammars

    def evaluate(self, pieces: Seq[Piece]) -> None:
        """Computes the KV values of all pieces in one batch: sequences of the pool only, or none of them.
        Raises ModelError."""

    def sampler(self, sampling: Sampling, history: Seq[int], matcher: Matcher | None = None) -> Sampler:
        """A sampler for a sequence whose prompt is `history`. With a `matcher`, which is its own from then
        on, it chooses what this allows."""

    def sample(self, row: int, sampler: Sampler) -> int:
        """The next token of piece number `row` of the last `evaluate`, which must have said `sample`.
        Raises GrammarError."""

    def logprobs(self, row: int) -> Logprobs:
        """What the model itself thinks of all tokens in that place."""

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""

    def clear(self, seq: int) -> None:
        """Forgets the sequence."""

    def cut(self, seq: int, n_tokens: int) -> bool:
        """Keeps the first `n_tokens` tokens only; False, leaving unknown values, where that can't be done."""

    def copy(self, source: int, seq: int, n_tokens: int) -> bool:
        """Fills a cleared sequence with the first `n_tokens` tokens of another; False, leaving unknown
        values, where that can't be done. Within the pool both then use the same cells."""

    def settle(self, seq: int) -> None:
        """Puts what the sequence holds where restoring its state would put it, so that what follows is
        computed in the same order. Raises ModelError, leaving unknown values."""

    def save(self, seq: int) -> memoryview:
        """A copy of the sequence's state, which any sequence can be restored from. Raises ModelError."""

    def restore(self, seq: int, memory: memoryview, start: int, end: int) -> bool:
        """Fills a cleared sequence from the state at `start` to `end` of `memory`; False, leaving unknown
        values, if it doesn't fit. The state and what lies before it may be overwritten."""

    def embedder(self) -> Embedder:
        """Takes memory when it is made. Raises ModelError; TooLarge where there is too little."""
