"""Usage figures of a cache: hits, and what they saved."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from headstart.names import CacheKey

# More than any server can count, and exact in JSON and as a float.
MOST = 2**53
# The years 1 to 9999.
FIRST, LAST = -62_135_596_800, 253_402_300_799

USAGE = "usage"

Count = Annotated[int, Meta(ge=0, le=MOST)]
Seconds = Annotated[float, Meta(ge=0, le=MOST)]
Time = Annotated[float, Meta(ge=FIRST, le=LAST)]


class CacheUsage(Struct, frozen=True):
    """The number of hits, the time of the last use, and what the hits saved: tokens that were not evaluated,
    and the time of evaluating them minus that of restoring them."""

    hits: Count = 0
    last_used: Time | None = None
    tokens_saved: Count = 0
    seconds_saved: Seconds = 0.0

    def plus(self, later: CacheUsage) -> CacheUsage:
        """The sum of both, within the limits of the fields."""
        return CacheUsage(
            min(self.hits + later.hits, MOST),
            self.last_used if later.last_used is None else later.last_used,
            min(self.tokens_saved + later.tokens_saved, MOST),
            _within(self.seconds_saved + later.seconds_saved),
        )


def _within(seconds: float) -> float:
    return min(seconds, float(MOST)) if seconds >= 0 else 0.0


def usage_key(key: CacheKey) -> tuple[str, str]:
    """Kind and key of the usage record of a cache."""
    return USAGE, f"{key.namespace}/{key.name}"
