"""Running builds, builds shared by several callers, and declared caches that are still to be built."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from headstart.caches.entry import Content, Entry, Form, Origin, Retention
from headstart.caches.store import Store
from headstart.errors import CacheConflict, HeadstartError
from headstart.names import CacheKey
from headstart.service.caching.builder import OnProgress
from headstart.service.interface.observer import Failure, Observer


@dataclass(frozen=True)
class BuildKey:
    """A requested build. Callers with equal keys may wait for the same build."""

    content: Content
    forms: frozenset[Form]
    retention: Retention
    origin: Origin

    @classmethod
    def of(cls, content: Content, forms: Sequence[Form], retention: Retention, origin: Origin) -> BuildKey:
        return cls(content, frozenset(forms), retention, origin)


class SharedBuild:
    """A build that several callers may join, identified by `build_key`. Set `task` as soon as it was
    started."""

    task: asyncio.Task[Entry]

    def __init__(self, build_key: BuildKey) -> None:
        self.build_key = build_key
        self.abandoned = False
        self._waiting = 0
        self._listeners: list[OnProgress] = []

    def tell(self, computed: int, total: int) -> None:
        for tell in self._listeners:
            tell(computed, total)

    async def join(self, on_progress: OnProgress | None) -> Entry:
        """The build's result, or its error. A cancelled caller leaves; when the last one leaves, the build is
        cancelled and can't be joined any more."""
        self._waiting += 1
        if on_progress:
            self._listeners.append(on_progress)
        try:
            return await asyncio.shield(self.task)
        finally:
            self._waiting -= 1
            if on_progress:
                self._listeners.remove(on_progress)
            if not self._waiting:
                self.abandoned = True
                self.task.cancel()


class Builds:
    """Running builds, at most one for each key; the store leaves a cache's files alone while it is built.
    Used from the event loop."""

    def __init__(self, store: Store, observer: Observer) -> None:
        self._store = store
        self._observer = observer
        self._tasks: dict[CacheKey, asyncio.Task[Entry]] = {}
        self._shared: dict[CacheKey, SharedBuild] = {}

    async def close(self) -> None:
        """Cancels all builds."""
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def __iter__(self) -> Iterator[CacheKey]:
        return iter(list(self._tasks))

    def __contains__(self, key: CacheKey) -> bool:
        return key in self._tasks

    def of(self, key: CacheKey) -> asyncio.Task[Entry] | None:
        return self._tasks.get(key)

    def is_building_for(self, model: str) -> bool:
        return any(key.namespace.model == model for key in self._tasks)

    def check_none(self, key: CacheKey) -> None:
        """Raises CacheConflict while the cache is being built."""
        if key in self._tasks:
            raise CacheConflict(f"The cache {key.name!r} is being built.", param="cache_name")

    def run(self, key: CacheKey, work: Coroutine[Any, Any, Entry]) -> asyncio.Task[Entry]:
        """Starts `work`, which builds the cache of this key; requests for the cache wait for it. If another
        build of the cache is running, `work` must wait for that one itself."""
        task = asyncio.create_task(work)
        self._tasks[key] = task
        self._store.use(key)
        task.add_done_callback(lambda done: self._ended(key, done))
        return task

    def share(self, key: CacheKey, build: SharedBuild, work: Coroutine[Any, Any, Entry]) -> None:
        """Runs `work` as a build that others may join."""
        build.task = self.run(key, work)
        self._shared[key] = build

    def shared(self, key: CacheKey) -> SharedBuild | None:
        return self._shared.get(key)

    def _ended(self, key: CacheKey, task: asyncio.Task[Entry]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]
            self._store.release(key)
            self._shared.pop(key, None)
        if not task.cancelled() and (error := task.exception()):
            self._observer.failed(Failure("build", f"{key.name} of {key.namespace}", error))


@dataclass
class PendingBuild:
    resolved: asyncio.Event = field(default_factory=asyncio.Event)
    error: HeadstartError | None = None


class PendingDeclared:
    """Declared caches that are still to be built. A declared name stays reserved for the configuration, even
    once its cache is built."""

    def __init__(self) -> None:
        self._pending: dict[CacheKey, PendingBuild] = {}

    def __contains__(self, key: CacheKey) -> bool:
        return key in self._pending

    def add(self, key: CacheKey) -> None:
        self._pending[key] = PendingBuild()

    def resolve(self, key: CacheKey, error: HeadstartError | None = None) -> None:
        """Records that the cache was built, or that it failed with this error."""
        pending = self._pending[key]
        pending.error = error
        pending.resolved.set()

    async def wait_resolved(self, key: CacheKey) -> None:
        """Waits until the declared cache is built or has failed; returns at once if the name isn't declared.
        Raises the error if it has failed."""
        if pending := self._pending.get(key):
            await pending.resolved.wait()
            if pending.error:
                raise pending.error.with_traceback(None)

    def unresolved(self) -> Iterator[CacheKey]:
        """Keys of the caches still to be built."""
        return (key for key, pending in self._pending.items() if not pending.resolved.is_set())
