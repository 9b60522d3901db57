"""The targets, and whether samples meet them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.lab import Sample
from bench.statistics import paired_ratios, summary

OURS = "headstart"
PEERS = ("llama-server", "llama-server best")
MAX_STEP_MS = 300


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured; `low` and `high` hold the middle half of the rounds."""

    figure: str
    wanted: str
    measured: float
    low: float
    high: float
    met: bool


@dataclass(frozen=True)
class Target:
    """`measured` of an arm, ours against that of the best of `others`; alone where there are none."""

    figure: str
    arm: str
    measured: str
    others: tuple[str, ...]
    limit: float
    at_least: bool = False
    who: str = OURS

    @property
    def wanted(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"

    def verdict(self, samples: Sequence[Sample]) -> Verdict | None:
        """None where something was not measured."""
        rounds = {who: self._rounds(samples, who) for who in (self.who, *self.others)}
        ours = rounds.pop(self.who)
        theirs = [values for values in rounds.values() if values]
        if not ours or bool(theirs) != bool(self.others):
            return None
        values = list(ours.values())
        if theirs:
            pick: Callable[..., dict[int, float]] = max if self.at_least else min
            values = paired_ratios(ours, pick(theirs, key=lambda values: summary(values.values()).median))
        of = summary(values)
        met = of.median >= self.limit if self.at_least else of.median <= self.limit
        return Verdict(self.figure, self.wanted, of.median, of.low, of.high, met)

    def _rounds(self, samples: Sequence[Sample], who: str) -> dict[int, float]:
        found = (s for s in samples if (s.arm, s.who) == (self.arm, who) and self.measured in s.values)
        return {sample.round: sample.values[self.measured] for sample in found}


DEFAULT, BEST = ((peer,) for peer in PEERS)
BARE = ("bare", "bare shared")
PLAIN = ("headstart plain",)
TARGETS = (
    Target("hit, resident, against llama-server as it comes", "b", "ttft_ms", DEFAULT, 0.5),
    Target("hit, resident, against its best settings", "b", "ttft_ms", BEST, 0.95),
    Target("hit, restored from file, against its best settings", "c", "ttft_ms", BEST, 0.9),
    Target("hit against the bare prefill of the same suffix", "h", "ttft_ms", BARE, 1.10),
    Target("cold, against its better setting", "a", "ttft_ms", PEERS, 1.05),
    Target("8 clients on one cache, requests/s, better setting", "e", "requests_per_s", PEERS, 1.5, True),
    Target("8 clients on 8 caches, requests/s, better setting", "f", "requests_per_s", PEERS, 1.0, True),
    Target("restore from a warm page cache, GB/s", "k", "restore_gb_s", (), 5, True),
    Target("first verified load (hash + restore), GB/s", "k", "verified_gb_s", (), 1.5, True),
    Target("cache creation against bare prefill of both forms", "i", "create_ms", ("bare",), 1.05),
    Target("cache creation against plain requests of both forms", "i", "create_ms", PLAIN, 1.05),
    Target("decode loop against bare decoding, 1 sequence", "h", "token_ms", BARE, 1.05),
    Target("decode loop against bare decoding, 8 sequences", "h8", "token_ms", BARE, 1.05),
    Target("longest gap in a stream during a build, ms", "l", "gap_ms", (), 2 * MAX_STEP_MS),
)


def verdicts(samples: Sequence[Sample]) -> list[Verdict]:
    return [verdict for target in TARGETS if (verdict := target.verdict(samples))]
