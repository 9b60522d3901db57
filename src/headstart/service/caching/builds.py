"""A build that several callers wait for: it is computed once, and ends when the last of them has left."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from headstart.caches.entry import Content, Entry, Form, Origin, Retention
from headstart.errors import HeadstartError
from headstart.service.caching.builder import OnProgress


@dataclass(frozen=True)
class BuildKey:
    """What a caller wants to be built. Those who want the same may wait for the same build."""

    content: Content
    forms: frozenset[Form]
    terms: Retention
    origin: Origin

    @classmethod
    def of(cls, content: Content, forms: Sequence[Form], terms: Retention, origin: Origin) -> BuildKey:
        return cls(content, frozenset(forms), terms, origin)


class SharedBuild:
    """The build of what was `asked`; `task` is to be set as soon as it was started."""

    task: asyncio.Task[Entry]

    def __init__(self, asked: BuildKey) -> None:
        self.asked = asked
        self.abandoned = False
        self._waiting = 0
        self._told: list[OnProgress] = []

    def tell(self, computed: int, total: int) -> None:
        for tell in self._told:
            tell(computed, total)

    async def join(self, on_progress: OnProgress | None) -> Entry:
        """The build's result, or its error. A caller that is cancelled leaves; the last one ends the build,
        which nobody may join any more."""
        self._waiting += 1
        if on_progress:
            self._told.append(on_progress)
        try:
            return await asyncio.shield(self.task)
        finally:
            self._waiting -= 1
            if on_progress:
                self._told.remove(on_progress)
            if not self._waiting:
                self.abandoned = True
                self.task.cancel()


Key = tuple[str, str]


@dataclass
class Promise:
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    error: HeadstartError | None = None


class PendingDeclared:
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
