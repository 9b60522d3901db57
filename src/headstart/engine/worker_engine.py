"""The interface between a worker and its engine. Implementations: `core/engine.py` and `rkllm/engine.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from headstart.protocol import Command, ModelInfo, RequestEvent

# Causes a step; may be called from any thread.
Wake = Callable[[], object]


class WorkerEngine(Protocol):
    """Runs the requests of one model. Every submitted request ends in exactly one terminal event. All methods
    must be called from one thread; none waits for a disk or a device for longer than one step takes."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def busy(self) -> bool:
        """Whether a step has something to do now; else nothing has until `handle` or a wake-up."""

    def handle(self, command: Command) -> None:
        """Takes a request, or cancels one."""

    def step(self) -> list[RequestEvent]:
        """Does the next part of the work, and returns the events since the last step, in order."""
