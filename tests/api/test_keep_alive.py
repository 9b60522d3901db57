"""Streams of long prefills are kept alive: by `ping` events for Anthropic's clients, else by comments."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from starlette.types import Message

from headstart.api import answer, sse
from headstart.api.answer import AnswerStream
from headstart.api.anthropic.response import PING, MessageWriter
from headstart.api.app import create_app
from headstart.api.completions.response import ChatWriter
from headstart.api.http.server import HttpConfig, HttpServer
from headstart.api.sse import EventStream, StartedEvents
from headstart.api.writer import Events
from headstart.config.settings import Settings
from headstart.errors import EngineDied
from headstart.protocol import Stats
from headstart.service.interface.answer import Delta, Ended, PromptProgress, Result
from headstart.service.service import Service

LONG = "How far does the light reach on a night without a moon? " * 10
QUESTION: Any = [{"role": "user", "content": LONG}]
OTHER_QUESTION: Any = [{"role": "user", "content": LONG[::-1]}]


@pytest.fixture
async def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """The address of a server whose responses begin early, and whose streams are soon taken for silent."""
    monkeypatch.setattr(answer, "BEGIN_SECONDS", 0.02)
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.05)
    settings = Settings(models={"toy": "toy:ms_per_token=1,eos=0"}, cache_dir=tmp_path, tune=False)
    service = Service(settings)
    listener = socket.create_server(("127.0.0.1", 0))
    server = HttpServer(HttpConfig(create_app(service), settings))
    serving = asyncio.create_task(server.serve([listener]))
    try:
        await service.load()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.stop()
        await serving
        await service.close()


async def posted(url: str, path: str, **body: Any) -> str:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        response = await client.post(path, json={"model": "toy", "stream": True, **body})
    assert response.status_code == 200
    return response.text


async def test_a_silent_message_begins_and_has_pings_until_its_content(slow: str) -> None:
    text = await posted(slow, "/v1/messages", messages=QUESTION, max_tokens=4)
    names = [line[7:] for line in text.splitlines() if line.startswith("event: ")]
    opened, begun = names.index("message_start"), names.index("content_block_start")
    # Pings may come while the request waits for a slot; the next one is part of the opening.
    assert set(names[:opened]) <= {"ping"}
    assert len(names[opened + 2 : begun]) > 1
    assert set(names[opened + 1 : begun]) == {"ping"}
    assert (names.count("message_start"), names[-1]) == (1, "message_stop")
    assert sse.COMMENT.decode() not in text

    options: Any = {"model": "toy", "messages": OTHER_QUESTION, "max_tokens": 4}
    options |= {"extra_body": {"temperature": 0}}
    async with AsyncAnthropic(base_url=slow, api_key="none", max_retries=0) as client:
        async with client.messages.stream(**options) as streaming:
            final: Any = await streaming.get_final_message()
        plain: Any = await client.messages.create(**options)
    assert [block.text for block in final.content] == [block.text for block in plain.content]
    assert final.usage.output_tokens == plain.usage.output_tokens


async def test_a_silent_chat_has_its_role_and_then_comments(slow: str) -> None:
    text = await posted(slow, "/v1/chat/completions", messages=QUESTION, max_tokens=4)
    first, *rest = text.split("\n\n")
    delta = json.loads(first.removeprefix("data: "))["choices"][0]["delta"]
    assert delta == {"role": "assistant", "content": ""}
    assert rest[:2] == [sse.COMMENT.decode().strip()] * 2
    assert text.count('"role"') == 1

    options: Any = {"model": "toy", "messages": OTHER_QUESTION, "max_tokens": 4, "temperature": 0}
    async with AsyncOpenAI(base_url=f"{slow}/v1", api_key="none", max_retries=0) as client:
        async with client.chat.completions.stream(**options) as streaming:
            await streaming.until_done()
            final = streaming.current_completion_snapshot
        plain = await client.chat.completions.create(**options)
    assert final.choices[0].message.content == plain.choices[0].message.content


async def answered() -> Events:
    yield Delta(0, "far")
    yield Ended(0, "stop")
    yield Result(1, Stats(5, 0, 5, 1, "none", 0, 0, 0.0, 0.0, 1.0, 1.0, 1.0))


async def test_a_stream_is_opened_once_by_whatever_is_sent_first() -> None:
    writer = ChatWriter("toy")
    writing = AnswerStream(answered(), writer)
    opening = writing.keep_alive()
    assert opening
    assert writing.keep_alive() == writer.keep_alive
    assert opening not in b"".join([data async for data in writing.writes()])


@pytest.mark.parametrize("reports_progress", [True, False])
async def test_a_message_is_opened_once_and_not_before_its_figures_are_known(reports_progress: bool) -> None:
    async def events() -> Events:
        for processed in (3, 5) if reports_progress else ():
            yield PromptProgress(0, 5, 3, processed, 1.0)
        async for event in answered():
            yield event

    writing = AnswerStream(events(), MessageWriter("toy", 5, None, with_reasoning=False))
    assert writing.keep_alive() == writing.keep_alive() == PING
    first, *rest = [data async for data in writing.writes()]
    assert first.startswith(b"event: message_start\n")
    assert b"message_start" not in b"".join(rest)
    # Progress alone opens the message; engines that report none open it with the answer.
    assert (b"content_block_start" in first) != reports_progress
    usage = json.loads(first.partition(b"data: ")[2].partition(b"\n")[0])["message"]["usage"]
    assert usage["cache_read_input_tokens"] == (3 if reports_progress else 0)
    assert usage["input_tokens"] == (2 if reports_progress else 5)


class Connection:
    """A client that stays, and keeps what is sent to it."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.heard = asyncio.Event()

    async def receive(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Message) -> None:
        self.messages.append(message)
        if message.get("body"):
            self.heard.set()


@pytest.mark.parametrize("fails", [False, True])
async def test_10_seconds_count_from_when_the_answer_was_waited_for(fails: bool) -> None:
    connection = Connection()

    async def nothing_until_the_client_heard() -> Events:
        await connection.heard.wait()
        if fails:
            raise EngineDied("It died.")
        async for event in answered():
            yield event

    source = nothing_until_the_client_heard()
    waiting: Any = asyncio.ensure_future(anext(source, None))
    begun: StartedEvents[Any] = StartedEvents(waiting, source, since=monotonic() - sse.KEEP_ALIVE_SECONDS)
    writing = AnswerStream(begun, ChatWriter("toy"))
    response = EventStream(
        writing.writes(), b"", lambda _: b"failed", keep_alive=writing.keep_alive, source=begun
    )
    await response({"type": "http"}, connection.receive, connection.send)
    start, first, *rest = connection.messages
    assert start["type"] == "http.response.start"
    assert b'"role":"assistant"' in first["body"]
    sent = b"".join(message["body"] for message in rest)
    assert b'"role"' not in sent
    assert sent == b"failed" if fails else b'"finish_reason":"stop"' in sent
