"""Times alternatives in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from headstart.engine.trials import Span, Trial, TrialShape

Key = TypeVar("Key")

ROUNDS = 5
# Groups of rounds, apart in time: a disturbance of only some of them shows as a difference.
GROUPS = 2
# The largest relative difference between the shortest times of groups.
AGREE = 0.10


class Bench:
    """A trial, and the number of tokens in each of its sequences."""

    def __init__(self, trial: Trial, shape: TrialShape) -> None:
        self.trial, self.shape = trial, shape
        self.depth = [0] * shape.sequences

    def extend(self, n: int) -> float:
        """Extends sequence 0 by `n` tokens; returns the milliseconds."""
        ms = self.trial.evaluate([Span(0, self.depth[0], n)])
        self.depth[0] += n
        return ms

    def time(self, n: int, seqs: Sequence[int] = (0,)) -> float:
        """Milliseconds for `n` more tokens in each sequence. They are cut off again; if the state can't be
        cut, they stay until there is no more room."""
        for seq in seqs:
            if self.depth[seq] + n > self.shape.tokens:
                self.trial.cut(seq, 0)
                self.depth[seq] = 0
        ms = self.trial.evaluate([Span(seq, self.depth[seq], n) for seq in seqs])
        for seq in seqs:
            if not self.trial.cut(seq, self.depth[seq]):
                self.depth[seq] += n
        return ms

    def timing(self, n: int, seqs: Sequence[int] = (0,)) -> Callable[[], float]:
        return lambda: self.time(n, seqs)


def in_turn(actions: Mapping[Key, Callable[[], float]], budget_ms: float) -> dict[Key, float]:
    """The shortest time of each action, over at least one round of all actions."""
    times: dict[Key, list[float]] = {key: [] for key in actions}
    spent = longest = 0.0
    for _ in range(ROUNDS):
        if spent and spent + longest > budget_ms:
            break
        for key, action in actions.items():
            times[key].append(action())
        this = sum(row[-1] for row in times.values())
        spent, longest = spent + this, max(longest, this)
    return {key: min(row) for key, row in times.items()}


def in_groups(
    actions: Mapping[Key, Callable[[], float]], budget_ms: float, pause: Callable[[], None]
) -> dict[Key, list[float]]:
    """The shortest time of each action in each group of rounds; `pause` is called between groups."""
    groups = []
    for number in range(GROUPS):
        if number:
            pause()
        groups.append(in_turn(actions, budget_ms / GROUPS))
    return {key: [group[key] for group in groups] for key in actions}


def disagreement(shortest: Sequence[float]) -> str:
    """The difference between the shortest times of groups, in words; "" if they agree."""
    apart = max(shortest) / max(min(shortest), 1e-6) - 1
    return f"its shortest times differ by {100 * apart:.0f} %" if apart > AGREE else ""
