"""What is said of samples: the middle, the ends and the spread, and ratios taken round by round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles


@dataclass(frozen=True)
class Summary:
    """`low` and `high` are the first and third quartile: half of the values lie between them."""

    n: int
    median: float
    min: float
    max: float
    low: float
    high: float


def summary(values: Iterable[float]) -> Summary:
    """Of at least one value."""
    ordered = sorted(values)
    assert ordered
    low, _, high = quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return Summary(len(ordered), median(ordered), ordered[0], ordered[-1], low, high)


def paired_ratios(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """For each round that both took part in."""
    return [ours[number] / theirs[number] for number in sorted(ours) if theirs.get(number)]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
