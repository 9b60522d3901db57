"""Sends an answer while it is generated: whole or as a stream, in the format of any dialect."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from headstart.api.sse import BEGIN_SECONDS, EventStream, start_events, while_connected
from headstart.api.writer import AnswerWriter, Events, Json
from headstart.service.interface.answer import Delta, Ended, PromptProgress, Result


async def answer(request: Request, events: Events, writer: AnswerWriter, *, stream: bool | None) -> Response:
    """Ends `events` if the client disconnects. Raises what they raise before the response begins."""
    request.state.streamed = bool(stream)
    return await (streamed if stream else whole)(request, events, writer)


async def whole(request: Request, events: Events, writer: AnswerWriter) -> Response:
    return JSONResponse(await while_connected(request, body(events, writer)))


async def streamed(request: Request, events: Events, writer: AnswerWriter) -> Response:
    started = await start_events(request, events, BEGIN_SECONDS)
    stream = AnswerStream(started, writer)
    return EventStream(
        stream.writes(),
        done=writer.done,
        failed=lambda error: b"".join(writer.failed(error)),
        keep_alive=stream.keep_alive,
        source=started,
    )


async def body(events: Events, writer: AnswerWriter) -> Json:
    """The whole answer. Returns after `events` have ended, which may do work after their Result."""
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Result):
                writer.closing(event)
            elif not isinstance(event, PromptProgress):
                writer.add(event)
    return writer.body


class AnswerStream:
    """The data of a stream, except its end. The opening is sent once: together with the first event, or
    earlier to keep a silent stream alive if the writer allows that."""

    def __init__(self, events: Events, writer: AnswerWriter) -> None:
        self.events = events
        self.writer = writer
        # None: still unknown.
        self._opening = None if writer.opens == "with_progress" else b"".join(writer.opening())

    async def writes(self) -> AsyncGenerator[bytes, None]:
        """Each item is to be sent in one write; the last one comes after `events` have ended, which may do
        work after their Result."""
        last = b""
        if self.writer.opens == "at_once":
            yield self._opened()
        async with aclosing(self.events) as events:
            async for event in events:
                if isinstance(event, Result):
                    last = b"".join(self.writer.closing(event))
                    continue
                data = b"".join(self._written(event))
                if data or isinstance(event, PromptProgress):
                    data = self._opened() + data
                if data:
                    yield data
        yield self._opened() + last

    def keep_alive(self) -> bytes:
        """Returns what to send now to a client that has heard nothing for long."""
        opened = b"" if self._opening is None else self._opened()
        return opened or self.writer.keep_alive

    def _written(self, event: PromptProgress | Delta | Ended) -> Iterable[bytes]:
        return self.writer.progress(event) if isinstance(event, PromptProgress) else self.writer.add(event)

    def _opened(self) -> bytes:
        """The opening, if it was not sent yet."""
        opening = b"".join(self.writer.opening()) if self._opening is None else self._opening
        self._opening = b""
        return opening
