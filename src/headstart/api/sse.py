"""Server-sent events, and detection of clients that disconnect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from time import monotonic
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headstart.api.fields.error import openai_body
from headstart.errors import HeadstartError, ShuttingDown

T = TypeVar("T")

# The longest wait for the first event before the response begins; a failure until then is an HTTP error.
BEGIN_SECONDS = 5.0
KEEP_ALIVE_SECONDS = 10.0
COMMENT = b": still working\n\n"
DONE = b"data: [DONE]\n\n"


class ClientLeft(HeadstartError):
    """The client disconnected, so it never sees this error; 499 is for the log."""

    status = 499


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client disconnects, cancels it and raises ClientLeft."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft("The client left.")
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def as_event(content: Any) -> bytes:
    """Encodes JSON-compatible content as an event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def as_named_event(content: dict[str, Any]) -> bytes:
    """Encodes an event whose name is the content's `type`."""
    kind: str = content["type"]
    return b"event: " + kind.encode() + b"\n" + as_event(content)


def failed(error: HeadstartError) -> bytes:
    """Encodes an error after the start of the stream as an event."""
    return as_event(openai_body(error))


class EventStream(Response):
    """Sends each item of `events` in one write, what `keep_alive` returns after each long pause, and `done`
    at the end. An error after the start is sent as an event encoded by `failed`; so is the server's shutdown,
    which cancels the response. If the client disconnects, even before the first byte, `events` and `source`
    are closed. The client has waited since `source` was waited for."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        done: bytes = DONE,
        failed: Callable[[HeadstartError], bytes] = failed,
        *,
        keep_alive: Callable[[], bytes] = lambda: COMMENT,
        source: StartedEvents[Any] | None = None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events = events
        self.done = done
        self.failed = failed
        self.keep_alive = keep_alive
        self.source = source
        self._sending = asyncio.Lock()
        self._last_sent = source.since if source else monotonic()
        self._has_begun = False
        self._has_ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = [self._send(send), self._keep_alive(send), _disconnected(receive)]
        tasks = [asyncio.ensure_future(task) for task in work]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await _cancelled(tasks)
            await self._end(send, self.failed(ShuttingDown()))
        finally:
            await _cancelled(tasks)
            # Closing `events` does not close its source if it was never iterated.
            await self.events.aclose()
            if self.source:
                await self.source.aclose()
        # Sending to a disconnected client raises OSError on some servers.
        with suppress(asyncio.CancelledError, OSError):
            await tasks[0]

    async def _send(self, send: Send) -> None:
        await self._begin(send)
        async with aclosing(self.events) as events:
            try:
                async for event in events:
                    await self._write(send, event)
            except HeadstartError as error:
                await self._write(send, self.failed(error))
        await self._end(send)

    async def _begin(self, send: Send) -> None:
        self._has_begun = True
        async with self._sending:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def _end(self, send: Send, last: bytes = b"") -> None:
        """Sends the end of the stream, only once."""
        if not self._has_begun:
            await self._begin(send)
        if not self._has_ended:
            self._has_ended = True
            await send({"type": "http.response.body", "body": last + self.done, "more_body": False})

    async def _write(self, send: Send, data: bytes) -> None:
        async with self._sending:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        self._last_sent = monotonic()

    async def _keep_alive(self, send: Send) -> None:
        while True:
            silent = monotonic() - self._last_sent
            if silent >= KEEP_ALIVE_SECONDS:
                await self._write(send, self.keep_alive())
            else:
                await asyncio.sleep(KEEP_ALIVE_SECONDS - silent)


async def _cancelled(tasks: Sequence[asyncio.Future[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def _next(events: AsyncIterator[T]) -> T | None:
    return await anext(events, None)


async def start_events(request: Request, events: AsyncGenerator[T, None], seconds: float) -> StartedEvents[T]:
    """Waits for the first event, at most `seconds`, and returns all events, so that an early failure is an
    HTTP error. Raises whatever `events` raises until then, or ClientLeft."""
    since = monotonic()
    first = asyncio.ensure_future(_next(events))
    watch = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait([first, watch], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if first.done():
            first.result()
        elif watch.done():
            raise ClientLeft("The client left.")
    except BaseException:
        first.cancel()
        with suppress(asyncio.CancelledError, HeadstartError):
            await first
        await events.aclose()
        raise
    finally:
        watch.cancel()
    return StartedEvents(first, events, since)


class StartedEvents(AsyncGenerator[T, None]):
    """Events whose first one was already requested, at `since` (monotonic seconds). Closing it closes
    `events` even if nothing was read. A generator function could not do that: closed before its first
    iteration, it runs none of its code."""

    def __init__(self, first: asyncio.Task[T | None], events: AsyncGenerator[T, None], since: float) -> None:
        self.since = since
        self._first = first
        self._events = events
        self._first_was_read = False

    def __anext__(self) -> Coroutine[Any, Any, T]:
        # Skips a coroutine per event.
        return self._events.__anext__() if self._first_was_read else self.asend(None)

    async def asend(self, _: None) -> T:
        if self._first_was_read:
            return await anext(self._events)
        event = await self._first
        self._first_was_read = True
        if event is None:
            raise StopAsyncIteration
        return event

    async def athrow(self, *error: Any) -> T:
        await self.aclose()
        raise error[0]

    async def aclose(self) -> None:
        self._first.cancel()
        await asyncio.wait([self._first])
        if not self._first.cancelled():
            # Retrieves an exception that nobody else may have retrieved, which asyncio would log.
            self._first.exception()
        await self._events.aclose()
