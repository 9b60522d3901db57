"""Limits on the bytes of caches, and eviction to make room for new ones."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from headstart.caches.entry import Entry
from headstart.caches.eviction import evictable, keeps_text, rank
from headstart.caches.store import Store
from headstart.errors import CacheNotFound, QuotaExceeded
from headstart.names import CacheKey, Namespace
from headstart.service.interface.observer import Evicted, Observer


class Quota:
    """`limit`: bytes that the files of all caches may take, 0 for no limit; `shares`: limits by owner.

    A cache that is being replaced doesn't count, although both files are on the disk until the new one is in
    place. A cache that is being built counts with its expected size. Used from the event loop."""

    def __init__(
        self,
        store: Store,
        limit: int = 0,
        shares: Mapping[str, int] | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.store = store
        self.observer = observer or Observer()
        self.limit = limit
        self.shares = shares or {}
        # Number of evictions by owner.
        self.evictions: Counter[str] = Counter()
        self._reserved: dict[CacheKey, int] = {}
        self._deciding = asyncio.Lock()

    def used(self, owner: str | None = None) -> int:
        """Bytes of the files of an owner or of all, as last read."""
        return sum(entry.size_bytes for entry in self._known(owner))

    def limit_of(self, owner: str) -> int:
        """Bytes that an owner's caches may take; 0 for no limit."""
        return min(filter(None, (self.limit, self.shares.get(owner, 0))), default=0)

    def _known(self, owner: str | None) -> Iterator[Entry]:
        return (entry for entry in self.store.known() if owner in (None, entry.owner))

    @contextmanager
    def reserving(self, key: CacheKey) -> Iterator[Reservation]:
        """Reserves room for one cache until its file is in place or the build has failed."""
        try:
            yield Reservation(self, key)
        finally:
            self._reserved.pop(key, None)

    async def reserve(self, key: CacheKey, size: int) -> None:
        """Makes room for `size` bytes of the cache, by eviction if needed. Raises QuotaExceeded, with nothing
        evicted, if eviction can't free enough, or StorageError."""
        async with self._deciding:
            limits = self._limits(key.namespace)
            for owner, limit in limits.items():
                self._missing(owner, limit, key, size)
            for owner, limit in limits.items():
                await self._evict(owner, self._missing(owner, limit, key, size), key)
            self._reserved[key] = size

    def check_possible(self, namespace: Namespace, size: int) -> None:
        """Raises QuotaExceeded if `size` exceeds a limit by itself."""
        for limit in self._limits(namespace).values():
            if size > limit:
                raise _exceeded(size, limit, limit)

    async def trim(self) -> None:
        """Evicts until all caches fit, as far as possible: the limit may have been lowered, or files may have
        been added to the directory."""
        async with self._deciding:
            for owner, limit in (*self.shares.items(), (None, self.limit)):
                if limit:
                    await self._evict(owner, self._taken(owner, None) - limit)

    def _limits(self, namespace: Namespace) -> Mapping[str | None, int]:
        """The limits that apply to caches of the namespace, by owner; None is the limit of all caches."""
        owner = namespace.owner
        limits = {owner: self.shares.get(owner, 0), None: self.limit}
        return {scope: limit for scope, limit in limits.items() if limit}

    def _taken(self, owner: str | None, but: CacheKey | None) -> int:
        sizes = {entry.key: entry.size_bytes for entry in self._known(owner)}
        for key, size in self._reserved.items():
            if owner in (None, key.namespace.owner):
                sizes[key] = max(size, sizes.get(key, 0))
        return sum(size for key, size in sizes.items() if key != but)

    def _missing(self, owner: str | None, limit: int, key: CacheKey, size: int) -> int:
        """Bytes to free. Raises QuotaExceeded if that is impossible."""
        free = limit - self._taken(owner, key)
        gain = 0 if size <= free else sum(_gain(entry) for entry in self._candidates(owner, key))
        if free + gain < size:
            # An API key must not learn how much others store and have pinned.
            others = owner is None and "@" in key[0]
            raise _exceeded(size, limit, None if others else free + gain)
        return size - free

    def _candidates(self, owner: str | None, but: CacheKey | None = None) -> list[Entry]:
        """Caches that may be evicted, least worth first."""
        now = self.store.clock()
        found = [
            (rank(entry, self.store.usage(entry), now), entry)
            for entry in evictable(self._known(owner))
            if entry.key != but and not self.store.is_in_use(entry.key)
        ]
        return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]

    async def _evict(self, owner: str | None, missing: int, but: CacheKey | None = None) -> int:
        """Evicts the states of least worth until `missing` bytes are free; returns the bytes still
        missing."""
        for entry in self._candidates(owner, but) if missing > 0 else ():
            if missing <= 0:
                break
            missing -= await self.evict(entry)
        return missing

    async def evict(self, entry: Entry) -> int:
        """Evicts the cache. Returns the bytes freed: 0 if the cache was replaced meanwhile or is being
        built."""
        if self.store.is_in_use(entry.key):
            return 0
        if keeps_text(entry):
            stub = await self.store.amend(entry, entry.without_states(), with_states=False)
            if stub is None:
                return 0
            freed = entry.size_bytes - stub.size_bytes
        else:
            try:
                self.store.delete(entry.key, evicts=True)
            except CacheNotFound:
                return 0
            freed = entry.size_bytes
        self.evictions[entry.owner] += 1
        self.observer.evicted(Evicted(entry, freed))
        return freed


class Reservation:
    def __init__(self, quota: Quota, key: CacheKey) -> None:
        self.quota = quota
        self.key = key

    async def reserve(self, size: int) -> None:
        """Reserves `size` bytes in place of the previous reservation; see Quota.reserve."""
        await self.quota.reserve(self.key, size)


def _gain(entry: Entry) -> int:
    return entry.tensor_bytes if keeps_text(entry) else entry.size_bytes


def _exceeded(size: int, limit: int, free: int | None) -> QuotaExceeded:
    """`free` None: the figure must not be disclosed."""
    most = "not as many" if free is None else f"no more than {max(free, 0) / 1e6:.2f} MB"
    return QuotaExceeded(
        f"There is no room: {size / 1e6:.2f} MB are needed, and of the {limit / 1e6:.2f} MB that caches may "
        f"take {most} can be freed by eviction. Delete or unpin caches, or "
        "raise quota_mb."
    )
