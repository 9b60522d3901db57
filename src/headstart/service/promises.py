"""Caches that are to be there before anybody may use them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

from headstart.errors import HeadstartError

Key = tuple[str, str]


@dataclass
class Promise:
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    error: HeadstartError | None = None


class Promises:
    """By shelf and name. A promised name stays one: it belongs to whoever made the promise."""

    def __init__(self) -> None:
        self._promises: dict[Key, Promise] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._promises

    def make(self, key: Key) -> None:
        self._promises[key] = Promise()

    def settle(self, key: Key, error: HeadstartError | None = None) -> None:
        """The cache is there, or why it isn't."""
        promise = self._promises[key]
        promise.error = error
        promise.settled.set()

    async def settled(self, key: Key) -> None:
        """Returns at once where nothing was promised. Raises the error of a promise that was not kept."""
        if promise := self._promises.get(key):
            await promise.settled.wait()
            if promise.error:
                raise promise.error.with_traceback(None)

    def open(self) -> Iterator[Key]:
        """Those still to be kept."""
        return (key for key, promise in self._promises.items() if not promise.settled.is_set())
