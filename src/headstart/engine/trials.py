"""The interface between measuring and a model. `engine/llama/trial.py` implements it; tests have
implementations of known cost. Implementations choose the tokens to evaluate: only the time counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from headstart.engine.tuning.machine_load import Watch
from headstart.numerics import Numerics, Weights


class Span(NamedTuple):
    """`n` tokens of sequence `seq` from position `start` on."""

    seq: int
    start: int
    n: int


@dataclass(frozen=True)
class TrialShape:
    """A context with `sequences` sequences: each with a KV stream of `tokens` tokens or, without `streams`,
    all in one cache of `tokens` tokens. At most `batch` tokens are evaluated at once."""

    sequences: int
    tokens: int
    streams: bool
    batch: int
    threads: int
    numerics: Numerics


class Trial(Protocol):
    """A context to be timed."""

    def evaluate(self, spans: Sequence[Span]) -> float:
        """Evaluates all spans in one call, with the last logits of each, and returns the milliseconds it
        took. Raises ModelError."""

    def set_threads(self, n: int) -> None: ...

    def cut(self, seq: int, n_tokens: int) -> bool:
        """Keeps the first `n_tokens` tokens; False, changing nothing, if the state can't be cut there. 0 is
        always possible."""

    def share(self, source: int, seq: int) -> None:
        """Lets the empty sequence `seq` use all cells of `source`; only without streams."""

    def save(self, seq: int) -> Any:
        """The sequence's state, usable in any trial of the same model and flash attention, with any
        weights."""

    def restore(self, seq: int, state: Any) -> None:
        """Fills an empty sequence. Raises ModelError."""

    def close(self) -> None:
        """Frees the memory; may be called again."""


class Trials(Protocol):
    """A model to be measured. `can_share`: sequences can use the same cells. `weights`: the available
    formats, the file's own first. `watch`: observes other load on the machine."""

    watch: Watch
    can_share: bool
    weights: Sequence[Weights]

    def trial(self, shape: TrialShape) -> Trial:
        """Creates a context. Raises ModelError if that is impossible."""

    def close(self) -> None: ...
