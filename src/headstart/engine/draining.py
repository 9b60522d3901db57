"""What other threads have left for the engine's next step."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def drained(queue: SimpleQueue[T]) -> Iterator[T]:
    """What is in the queue now, and what comes while it is read."""
    try:
        while True:
            yield queue.get_nowait()
    except Empty:
        return
