"""A queue in which owners take turns."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

from headstart.round_robin import RoundRobin

T = TypeVar("T")


class OwnerTurns(Generic[T]):
    """Items of several owners: those of one owner come out in order, alternating with those of others."""

    def __init__(self) -> None:
        self._waiting: RoundRobin[T] = RoundRobin()
        self._there = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, owner: str, item: T) -> None:
        self._waiting.put(owner, item)
        self._there.set()

    async def next(self) -> T:
        while not self._waiting:
            self._there.clear()
            await self._there.wait()
        return self.pop()

    def pop(self) -> T:
        """Raises StopIteration if nothing waits."""
        return self._waiting.take()
