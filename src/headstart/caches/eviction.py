"""Which caches give up their states first when there is no room."""

from __future__ import annotations

import math
from collections.abc import Iterable

from headstart.caches.entry import Entry
from headstart.caches.index.usage import Usage

HALF_LIFE_SECONDS = 86400.0


def worth(entry: Entry, usage: Usage, now: float) -> float:
    """What keeping the cache's states is worth for each byte they take.

        seconds their computing takes / bytes * (1 + hits) / 2 ** (days since the last use)

    Room is what is scarce, so value counts by the byte: of two caches that save the same, the larger goes,
    and of two of a size the one that is quicker to compute. Each hit speaks for one more to come, but less so
    the longer ago the last one was: a cache that was used a hundred times is worth what a new one is after a
    week without. One just made counts as just used. A clock that was set back makes nothing older."""
    last = max(usage.last_used or 0.0, entry.updated)
    days = max(now - last, 0.0) / HALF_LIFE_SECONDS
    fading = math.pow(0.5, min(days, 1000.0))
    return entry.cost_ms / 1000 / max(entry.size_bytes, 1) * (1 + usage.hits) * fading


def rank(entry: Entry, usage: Usage, now: float) -> tuple[bool, float]:
    """What orders caches, the first to go first: responses, which nobody named, then by worth."""
    return entry.origin != "response", worth(entry, usage, now)


def keeps_text(entry: Entry) -> bool:
    """Whether somebody named the cache, so that its text must stay when its states are given up."""
    return entry.origin not in ("automatic", "derived")


def evictable(entries: Iterable[Entry]) -> list[Entry]:
    """Those that may go, and would leave room."""
    return [entry for entry in entries if not entry.terms.pinned and (entry.forms or not keeps_text(entry))]
