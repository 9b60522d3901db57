"""Models to be measured whose costs are known, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from headstart.engine.model import ModelError
from headstart.engine.trials import Span, TrialShape
from headstart.engine.tuning.machine_load import Spent, Watch
from headstart.numerics import Weights
from headstart.protocol import EngineSettings

# Of a call: the trial's shape, its threads, new tokens, and the tokens that sequences hold after it.
Cost = Callable[[TrialShape, int, int, int], float]


@dataclass
class FakeTrial:
    """Holds token counts; a wrong start is an error, as in the real engine."""

    shape: TrialShape
    owner: FakeTrials
    threads: int = 0
    closed: bool = False
    held: dict[int, int] = field(default_factory=dict)

    def evaluate(self, spans: Sequence[Span]) -> float:
        assert not self.closed
        for seq, start, n in spans:
            assert 0 <= seq < self.shape.sequences
            assert self.held.get(seq, 0) == start
            assert start + n <= self.shape.tokens
            self.held[seq] = start + n
        n_tokens = sum(span.n for span in spans)
        assert n_tokens <= self.shape.batch
        depth = max(span.start + span.n for span in spans)
        ms = self.owner.cost(self.shape, self.threads or self.shape.threads, n_tokens, depth)
        self.owner.spent += ms
        return ms

    def set_threads(self, n: int) -> None:
        self.threads = n

    def cut(self, seq: int, n_tokens: int) -> bool:
        if n_tokens and not self.owner.can_cut:
            return False
        self.held[seq] = n_tokens
        return True

    def share(self, source: int, seq: int) -> None:
        assert not self.shape.streams
        self.held[seq] = self.held[source]

    def save(self, seq: int) -> Any:
        assert not self.closed
        return self.held[seq], self.shape.numerics.flash_attention

    def restore(self, seq: int, state: Any) -> None:
        self.held[seq], flash_attention = state
        assert flash_attention == self.shape.numerics.flash_attention
        self.owner.restored += 1

    def close(self) -> None:
        self.closed = True


class Calm(Watch):
    """A machine that does nothing else, or what it is told to: `doing`, CPUs that others use."""

    def __init__(self, doing: float = 0.0) -> None:
        self.doing = doing
        self.seconds = 0.0
        self.pauses = 0
        super().__init__(self._spent)

    def _spent(self) -> Spent:
        self.seconds += 1
        return Spent(self.seconds, self.seconds * self.doing)

    def pause(self) -> None:
        self.pauses += 1


@dataclass
class FakeTrials:
    cost: Cost
    can_share: bool = True
    can_cut: bool = True
    weights: Sequence[Weights] = ("file",)
    refused: Callable[[TrialShape], bool] = lambda shape: False
    spent: float = 0.0
    restored: int = 0
    made: list[FakeTrial] = field(default_factory=list)
    watch: Watch = field(default_factory=Calm)
    closed: bool = False

    def __call__(self, settings: EngineSettings) -> FakeTrials:
        return self

    def trial(self, shape: TrialShape) -> FakeTrial:
        if self.refused(shape):
            raise ModelError("no such context")
        self.made.append(FakeTrial(shape, self))
        return self.made[-1]

    def close(self) -> None:
        self.closed = True
