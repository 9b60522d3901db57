"""A queue in which several owners take turns."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class RoundRobin(Generic[T]):
    """Each owner's items leave in order, and no owner's second item before every other owner's first."""

    def __init__(self) -> None:
        # In the order of turns; no queue in it is empty.
        self._queues: dict[str, deque[T]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def count(self, owner: str) -> int:
        return len(self._queues.get(owner, ()))

    def put(self, owner: str, thing: T) -> None:
        self._queues.setdefault(owner, deque()).append(thing)

    def take(self) -> T:
        """Removes and returns the next item. Raises StopIteration if there is none."""
        owner = next(iter(self._queues))
        queue = self._queues.pop(owner)
        thing = queue.popleft()
        if queue:
            self._queues[owner] = queue
        return thing

    def remove(self, owner: str, thing: T) -> None:
        """Does nothing if the item isn't queued."""
        queue = self._queues.get(owner, deque())
        with suppress(ValueError):
            queue.remove(thing)
        if not queue:
            self._queues.pop(owner, None)

    def last_of_longest(self) -> tuple[str, T]:
        """The owner with the most items, and the last of them. The queue must not be empty."""
        owner = max(self._queues, key=self.count)
        return owner, self._queues[owner][-1]
