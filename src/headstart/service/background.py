"""Tasks that run beside requests."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundTasks:
    """Keeps its tasks referenced until they end; asyncio alone doesn't. Used from the event loop. `grace`:
    the seconds for which `close` waits before it cancels what is still running."""

    def __init__(self, grace: float = 0.0) -> None:
        self.grace = grace
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def join(self) -> None:
        """Returns when the tasks started so far have ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Returns when all tasks have ended; their errors are ignored."""
        if self._tasks and self.grace:
            await asyncio.wait(self._tasks, timeout=self.grace)
        late = list(self._tasks)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
