"""The order in which caches are evicted."""

from __future__ import annotations

import math
from collections.abc import Iterable

from headstart.caches.entry import Entry
from headstart.caches.index.usage import CacheUsage

HALF_LIFE_SECONDS = 86400.0


def worth(entry: Entry, usage: CacheUsage, now: float) -> float:
    """The worth of keeping the cache's states, per byte.

        seconds of computation / bytes * (1 + hits) / 2 ** (days since the last use)

    Space is scarce, so value counts per byte: of two caches that save the same time, the larger is evicted
    first; of two of one size, the one that is quicker to compute. Each hit makes another one likelier, but
    less so the longer ago the last one was: after a week without use, a cache with a hundred hits is worth
    about as much as a new one. A new cache counts as just used. Setting the clock back makes no cache
    older."""
    last = max(usage.last_used or 0.0, entry.updated)
    days = max(now - last, 0.0) / HALF_LIFE_SECONDS
    fading = math.pow(0.5, min(days, 1000.0))
    return entry.cost_ms / 1000 / max(entry.size_bytes, 1) * (1 + usage.hits) * fading


def rank(entry: Entry, usage: CacheUsage, now: float) -> tuple[bool, float]:
    """Sort key of caches, first to evict first: stored responses, which have no name from a user, then by
    worth."""
    return entry.origin != "response", worth(entry, usage, now)


def keeps_text(entry: Entry) -> bool:
    """Whether a user named the cache or stored it, so that its content must stay when its states are
    evicted."""
    return entry.origin not in ("automatic", "derived")


def evictable(entries: Iterable[Entry]) -> list[Entry]:
    """The caches that may be evicted and whose eviction frees bytes."""
    return [
        entry for entry in entries if not entry.retention.pinned and (entry.forms or not keeps_text(entry))
    ]
