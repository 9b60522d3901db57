"""Things that wait, of several owners who take turns."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class RoundRobin(Generic[T]):
    """Each owner's things are taken in their order, and no owner's second before every other's first."""

    def __init__(self) -> None:
        # Whose turn is next comes first; no queue in it is empty.
        self._queues: dict[str, deque[T]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def count(self, owner: str) -> int:
        return len(self._queues.get(owner, ()))

    def put(self, owner: str, thing: T) -> None:
        self._queues.setdefault(owner, deque()).append(thing)

    def take(self) -> T:
        """The next one. Raises StopIteration where there is none."""
        owner = next(iter(self._queues))
        queue = self._queues.pop(owner)
        thing = queue.popleft()
        if queue:
            self._queues[owner] = queue
        return thing

    def remove(self, owner: str, thing: T) -> None:
        """Does nothing where it waits no more."""
        queue = self._queues.get(owner, deque())
        with suppress(ValueError):
            queue.remove(thing)
        if not queue:
            self._queues.pop(owner, None)

    def last_of_longest(self) -> tuple[str, T]:
        """The owner with the most things, and the last of them. There must be one."""
        owner = max(self._queues, key=self.count)
        return owner, self._queues[owner][-1]
