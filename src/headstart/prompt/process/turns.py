"""Who is next: of those who wait, one of each owner in turn."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """What one owner has put in comes out in its order, and between it what others have."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()
        self._there = asyncio.Event()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, owner: str, item: T) -> None:
        self._waiting.setdefault(owner, deque()).append(item)
        self._there.set()

    async def next(self) -> T:
        while not self._waiting:
            self._there.clear()
            await self._there.wait()
        return self.pop()

    def pop(self) -> T:
        """Raises KeyError where nothing waits."""
        owner, items = self._waiting.popitem(last=False)
        item = items.popleft()
        if items:
            self._waiting[owner] = items
        return item
