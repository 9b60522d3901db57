"""Queues between threads."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def drained(queue: SimpleQueue[T]) -> Iterator[T]:
    """The items in the queue, including those that arrive during the iteration."""
    try:
        while True:
            yield queue.get_nowait()
    except Empty:
        return
