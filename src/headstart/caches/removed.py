"""The caches whose text is no longer to be kept anywhere: deleted, replaced by others, or expired."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from headstart.caches.cache_file import format
from headstart.caches.cache_file.format import Corrupt
from headstart.caches.entry import Entry, Form
from headstart.names import CacheKey


@dataclass(frozen=True, eq=False)
class RemovedCache:
    """A cache that is gone, and the tokens of its forms as far as they could be read."""

    entry: Entry
    tokens: Mapping[Form, list[int]]


def tokens_of(path: Path) -> Mapping[Form, list[int]]:
    """The token ids in a cache file; none if it can't be read."""
    try:
        return format.read_tokens(path)
    except (Corrupt, OSError):
        return {}


class RemovedCaches:
    """Removed caches until somebody has seen to them. `path`: the place of a cache's file."""

    def __init__(self, path: Callable[[CacheKey], Path]) -> None:
        self._path = path
        self._waiting: list[RemovedCache] = []

    def note(self, entry: Entry) -> None:
        """The cache, whose file is still there, is about to be removed or replaced."""
        self._waiting.append(RemovedCache(entry, tokens_of(self._path(entry.key))))

    def note_replaced(self, known: Entry | None, entry: Entry) -> None:
        """Notes the cache, if there is one, unless `entry`, which is to take its place, has its text."""
        if known and known.content != entry.content:
            self.note(known)

    def of(self, model: str | None) -> list[RemovedCache]:
        """The caches of one model, or all."""
        return [removed for removed in self._waiting if model in (None, removed.entry.model)]

    def settle(self, removed: RemovedCache) -> None:
        """It has been seen to."""
        self._waiting.remove(removed)
