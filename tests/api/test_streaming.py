"""The bytes of streamed answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from headstart.api import sse
from headstart.api.answer import AnswerStream
from headstart.api.completions.response import ChatWriter, TextWriter
from headstart.api.sse import COMMENT, EventStream, as_event
from headstart.api.writer import Events
from headstart.errors import EngineDied
from headstart.protocol import Stats
from headstart.service.interface.answer import Delta, Ended, Result

STATS = Stats(5, 0, 5, 3, "none", 0, 0, 0.0, 0.0, 1.0, 1.0, 1.0)
RESULT = Result(3, STATS)


async def _answer(texts: list[str]) -> Events:
    for text in texts:
        yield Delta(0, text)
    yield Ended(0, "stop")
    yield RESULT


def _written(texts: list[str], writer: ChatWriter) -> list[list[Any]]:
    """The chunks of each write."""

    async def collect() -> list[bytes]:
        return [data async for data in AnswerStream(_answer(texts), writer).writes()]

    written = [data.decode().split("\n\n") for data in asyncio.run(collect())]
    assert all(write.pop() == "" for write in written)
    return [[json.loads(event.removeprefix("data: ")) for event in write] for write in written]


@pytest.mark.parametrize("kind", [ChatWriter, TextWriter])
@pytest.mark.parametrize("include_usage", [False, True])
@given(texts=st.lists(st.text(min_size=1) | st.sampled_from(['"', "\0", '"\0"', "\\u0000", "\n\n"])))
def test_each_text_is_in_a_chunk_as_if_that_had_been_encoded_whole(
    kind: type[ChatWriter], include_usage: bool, texts: list[str]
) -> None:
    writer = kind("toy", include_usage=include_usage)
    chunks = [chunk for write in _written(texts, writer) for chunk in write]
    extra = {"usage": None} if include_usage else {}
    opening = [chunk | extra for chunk in [writer.opening_chunk(0)] if chunk]
    said = [writer.chunk(Delta(0, text)) | extra for text in texts]
    assert chunks[: len(opening + said)] == opening + said
    last, *account = chunks[len(opening + said) :]
    assert last["choices"][0]["finish_reason"] == "stop"
    assert [chunk["usage"]["completion_tokens"] for chunk in account] == ([3] if include_usage else [])


def test_a_step_of_the_engine_is_one_write_and_so_is_what_begins_and_ends_an_answer() -> None:
    written = _written(["one", "two"], ChatWriter("toy", include_usage=True))
    assert [len(write) for write in written] == [2, 1, 2]
    assert written[0][0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["delta"] for chunk in written[0][1:] + written[1]] == [
        {"content": "one"},
        {"content": "two"},
    ]


class Connection:
    """A client that reads what is sent to it, and leaves when it is told to."""

    def __init__(self) -> None:
        self.received = b""
        self.changed = asyncio.Event()
        self.left = asyncio.Event()

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.received += message.get("body", b"")
        self.changed.set()

    async def until(self, text: bytes) -> None:
        while text not in self.received:
            self.changed.clear()
            await self.changed.wait()

    async def read(self, events: AsyncGenerator[bytes, None]) -> None:
        await EventStream(events)({"type": "http"}, self.receive, self.send)


async def test_a_silent_stream_is_kept_alive_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.01)
    connection = Connection()

    async def events() -> AsyncGenerator[bytes, None]:
        yield as_event("before")
        await connection.until(COMMENT + COMMENT)
        yield as_event("after")

    await connection.read(events())
    assert connection.received.startswith(b'data: "before"\n\n' + COMMENT)
    assert connection.received.endswith(COMMENT + b'data: "after"\n\ndata: [DONE]\n\n')


async def test_a_stream_that_is_not_silent_has_no_comments() -> None:
    connection = Connection()

    async def events() -> AsyncGenerator[bytes, None]:
        yield as_event("one")
        yield as_event("two")

    await connection.read(events())
    assert connection.received == b'data: "one"\n\ndata: "two"\n\ndata: [DONE]\n\n'


async def test_an_error_after_the_start_is_an_event() -> None:
    connection = Connection()

    async def events() -> AsyncGenerator[bytes, None]:
        yield as_event("one")
        raise EngineDied("It died.")

    await connection.read(events())
    first, error, end = connection.received.removesuffix(b"\n\n").split(b"\n\n")
    assert (first, end) == (b'data: "one"', b"data: [DONE]")
    assert json.loads(error.removeprefix(b"data: "))["error"]["message"] == "It died."


async def test_when_the_client_leaves_the_events_are_closed() -> None:
    connection = Connection()
    closed = False

    async def events() -> AsyncGenerator[bytes, None]:
        nonlocal closed
        try:
            yield as_event("one")
            connection.left.set()
            await asyncio.Event().wait()
        finally:
            closed = True

    await connection.read(events())
    assert closed
    assert connection.received == b'data: "one"\n\n'
