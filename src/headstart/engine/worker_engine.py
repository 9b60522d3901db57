"""The interface between a worker and its engine. Implementations: `core/engine.py` and `rkllm/engine.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from headstart.protocol import Command, ModelInfo, RequestEvent, StoreReport

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

    @property
    def pause(self) -> float | None:
        """Seconds after which a step has something to do although it isn't busy; None: only `handle` or a
        wake-up gives it something."""

    def handle(self, command: Command) -> None:
        """Takes a request, or cancels one."""

    def step(self) -> list[RequestEvent]:
        """Does the next part of the work, and returns the events since the last step, in order."""

    def report(self) -> StoreReport | None:
        """The state store's content and counts, if they have changed since they were last returned."""

    def flush(self, seconds: float) -> None:
        """Ends all requests without events, and stores what they computed where that is possible, for at most
        so many seconds."""
