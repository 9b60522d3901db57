"""What measuring asks of a model; `engine/llama/trial.py` is the real one, tests have others whose costs are
known. Which tokens are evaluated is theirs to choose: only the time counts."""

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
    """Room for `sequences` sequences of `tokens` tokens each, with a KV stream for each or (not `streams`) in
    one cache that holds `tokens` in all; up to `batch` tokens evaluated at once."""

    sequences: int
    tokens: int
    streams: bool
    batch: int
    threads: int
    arithmetic: Numerics


class Trial(Protocol):
    """A context of its own, to be timed."""

    def evaluate(self, spans: Sequence[Span]) -> float:
        """Evaluates all spans in one call, wanting the last logits of each; the milliseconds it took. Raises
        ModelError."""

    def set_threads(self, n: int) -> None: ...

    def cut(self, seq: int, n_tokens: int) -> bool:
        """Keeps the first `n_tokens` tokens, 0 always being possible; False, changing nothing, where a state
        can't be cut."""

    def share(self, source: int, seq: int) -> None:
        """Without streams: an empty sequence uses all cells of another."""

    def save(self, seq: int) -> Any:
        """The sequence's state, for any trial of the same model and flash attention, whatever its weights."""

    def restore(self, seq: int, state: Any) -> None:
        """Fills an empty sequence. Raises ModelError."""

    def close(self) -> None:
        """Frees the memory; may be called again."""


class Trials(Protocol):
    """A model to be tried. `can_share`: its sequences can use the same cells. `weights`: the formats there
    are, the file's own first. `watch`: sees what else the machine does."""

    watch: Watch
    can_share: bool
    weights: Sequence[Weights]

    def trial(self, shape: TrialShape) -> Trial:
        """Raises ModelError when there can't be such a context."""

    def close(self) -> None: ...
