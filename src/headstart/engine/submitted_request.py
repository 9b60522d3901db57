"""Requests that were submitted to a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, NamedTuple

from headstart.errors import (
    BadRequest,
    EngineDied,
    EngineError,
    OutOfMemory,
    StorageError,
    StorageFull,
)
from headstart.protocol import Embedded, Failed, Finished, Forgotten, RequestEvent, Token

if TYPE_CHECKING:
    from headstart.engine.client import EngineClient

FORGET_SECONDS = 30.0
FAILURES = {
    "engine": EngineError,
    "grammar": BadRequest,
    "memory": OutOfMemory,
    "storage": StorageError,
    "storage_full": StorageFull,
    "died": EngineDied,
}


class SubmittedRequest:
    """A submitted request, an iterator over its events. It ends after Embedded, or after one Finished for
    each of its `n` answers, whose ids are consecutive. Use it as a context manager: leaving it early cancels
    the sequences, which then end within one engine step."""

    def __init__(self, first_id: int, n: int, engine: EngineClient, n_prompt: int = 0) -> None:
        self.id = first_id
        self.n_prompt = n_prompt
        self.ids = range(first_id, first_id + n)
        self.engine = engine
        # False while it waits for a slot.
        self.has_begun = False
        self.n_generated = 0
        self._events: asyncio.Queue[RequestEvent] = asyncio.Queue()
        self._open = set(self.ids)

    def tell(self, event: RequestEvent) -> None:
        self.has_begun = True
        self.n_generated += isinstance(event, Token)
        self._events.put_nowait(event)

    def cancel(self, answer: int = 0) -> None:
        """Requests the end of one answer; its Finished event still follows."""
        self.engine.cancel(self.id + answer)

    def __enter__(self) -> SubmittedRequest:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.release(self)
        for open_id in self._open:
            self.engine.cancel(open_id)

    async def __aiter__(self) -> AsyncIterator[RequestEvent]:
        """Raises a HeadstartError when one of the answers fails."""
        while self._open:
            event = await self._events.get()
            if isinstance(event, Finished | Embedded | Failed):
                self._open.discard(event.id)
            if isinstance(event, Failed):
                raise FAILURES[event.kind](event.message)
            yield event


class PendingForgets:
    """The Forget commands that a worker hasn't answered yet."""

    def __init__(self) -> None:
        self._answers: dict[int, asyncio.Future[int]] = {}

    async def answer(self, command_id: int) -> int:
        """The number of blocks that were removed. Raises EngineDied, also if the answer takes too long."""
        answer = self._answers[command_id] = asyncio.get_running_loop().create_future()
        try:
            return await asyncio.wait_for(answer, FORGET_SECONDS)
        except TimeoutError as error:
            raise EngineDied("The engine doesn't answer.") from error
        finally:
            del self._answers[command_id]

    def tell(self, event: Forgotten) -> None:
        if (answer := self._answers.get(event.id)) and not answer.done():
            answer.set_result(event.n_blocks)

    def fail(self, message: str) -> None:
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineDied(message))


class EngineLoad(NamedTuple):
    """The requests that the worker evaluates and those that wait for a slot; `kv_usage`: the part of the
    slots' room that the former's tokens take, from 0 to 1."""

    running: int
    waiting: int
    kv_usage: float
