"""Sends an answer while it is generated: whole or as a stream, in the format of any dialect."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from headstart.api.sse import BEGIN_SECONDS, EventStream, start_events, while_connected
from headstart.api.writer import AnswerWriter, Events, Json
from headstart.service.interface.answer import Result


async def answer(request: Request, events: Events, writer: AnswerWriter, *, stream: bool | None) -> Response:
    """Ends `events` if the client disconnects. Raises what they raise before the response begins."""
    return await (streamed if stream else whole)(request, events, writer)


async def whole(request: Request, events: Events, writer: AnswerWriter) -> Response:
    return JSONResponse(await while_connected(request, body(events, writer)))


async def streamed(request: Request, events: Events, writer: AnswerWriter) -> Response:
    started = await start_events(request, events, BEGIN_SECONDS)
    return EventStream(
        writes(started, writer),
        done=writer.done,
        failed=lambda error: b"".join(writer.failed(error)),
        source=started,
    )


async def body(events: Events, writer: AnswerWriter) -> Json:
    """The whole answer. Returns after `events` have ended, which may do work after their Result."""
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Result):
                writer.closing(event)
            else:
                writer.add(event)
    return writer.body


async def writes(events: Events, writer: AnswerWriter) -> AsyncGenerator[bytes, None]:
    """The data of a stream, except its end. Each item is to be sent in one write; the last one comes after
    `events` have ended, which may do work after their Result."""
    waiting = b"".join(writer.opening())
    if writer.opens_at_once:
        yield waiting
        waiting = b""
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Result):
                waiting += b"".join(writer.closing(event))
            elif data := b"".join(writer.add(event)):
                yield waiting + data
                waiting = b""
    yield waiting
