"""Streams with `return_progress` tell how far the prompt is evaluated."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI

from headstart.api.answer import AnswerStream
from headstart.api.completions.response import ChatWriter
from headstart.api.completions.schema import ChatChunk, TextChunk
from headstart.api.writer import Events
from headstart.protocol import Stats
from headstart.service.interface.answer import Delta, Ended, PromptProgress, Result
from servers import Json, RunningServer, events, said

SYSTEM = "You keep the lighthouse and answer in few words. " * 10
LONG = "How far does the light reach on a night without a moon? " * 10
QUESTION: Any = [{"role": "user", "content": LONG}]
GREEDY: Json = {"model": "toy", "temperature": 0, "max_tokens": 12}
BODIES: dict[str, Json] = {
    "/v1/chat/completions": {"messages": QUESTION, **GREEDY},
    "/v1/completions": {"prompt": LONG, **GREEDY},
}
SCHEMAS = {"/v1/chat/completions": ChatChunk, "/v1/completions": TextChunk}
PROGRESS: Json = {"return_progress": True}
STREAM: Json = {"stream": True, "stream_options": {"include_usage": True}}
paths = pytest.mark.parametrize("path", BODIES)


@pytest.fixture
def named(toy: RunningServer) -> str:
    toy.create("keeper-of-progress", SYSTEM)
    return "keeper-of-progress"


def stream(server: RunningServer, path: str, **more: Any) -> list[Json]:
    with server.http.stream("POST", path, json={**BODIES[path], **STREAM, **more}) as response:
        return list(events(response))


def text(chunks: list[Json]) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(
        choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices
    )


def progress_of(chunks: list[Json]) -> list[Json]:
    return [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]


@paths
def test_progress_goes_from_the_cached_tokens_to_the_end_of_the_prompt(
    toy: RunningServer, path: str, named: str
) -> None:
    for more in ({"cache_prompt": False}, {"use_cache": named}):
        chunks = stream(toy, path, **PROGRESS, **more)
        for chunk in chunks:
            SCHEMAS[path].model_validate(chunk)
        usage = chunks[-1]["usage"]
        told = progress_of(chunks)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert (cached > 0) == ("use_cache" in more)
        assert {each["total"] for each in told} == {usage["prompt_tokens"]}
        assert {each["cache"] for each in told} == {cached}
        processed = [each["processed"] for each in told]
        assert processed == sorted(set(processed))
        assert (processed[0], processed[-1]) == (cached, usage["prompt_tokens"])
        assert len(processed) > 4
        times = [each["time_ms"] for each in told]
        assert times == sorted(times)


@paths
def test_progress_precedes_the_answer_and_changes_nothing_of_it(toy: RunningServer, path: str) -> None:
    plain = stream(toy, path)
    chunks = stream(toy, path, **PROGRESS)
    assert not progress_of(plain)
    assert text(chunks) == text(plain) != ""
    at = [index for index, chunk in enumerate(chunks) if "prompt_progress" in chunk]
    assert at == list(range(at[0], at[-1] + 1))
    assert text(chunks[: at[-1] + 1]) == ""
    assert [len(chunk["choices"]) for chunk in chunks[: at[-1] + 1]] == [1] * (at[-1] + 1)
    rest = [chunk for chunk in chunks if "prompt_progress" not in chunk]
    assert [chunk["choices"] for chunk in rest] == [chunk["choices"] for chunk in plain]


@paths
def test_a_whole_answer_has_no_progress(toy: RunningServer, path: str) -> None:
    plain = toy.post(path, **BODIES[path]).json()
    asked = toy.post(path, **BODIES[path], **PROGRESS).json()
    assert "prompt_progress" not in asked
    assert said(asked) == said(plain)


def test_each_prompt_of_a_list_has_progress_of_its_own(toy: RunningServer) -> None:
    prompts = [LONG, LONG[::-1][:300]]
    chunks = stream(toy, "/v1/completions", prompt=prompts, n=2, cache_prompt=False, **PROGRESS)
    told = [
        (chunk["choices"][0]["index"], chunk["prompt_progress"])
        for chunk in chunks
        if "prompt_progress" in chunk
    ]
    assert [index for index, _ in told] == sorted(index for index, _ in told)
    ends = dict(told)
    assert list(ends) == [0, 2]
    assert all(each["processed"] == each["total"] for each in ends.values())
    assert sum(each["total"] for each in ends.values()) == chunks[-1]["usage"]["prompt_tokens"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_other_dialects_accept_the_field_and_send_their_own_events(toy: RunningServer, path: str) -> None:
    body = {"input": LONG} if path == "/v1/responses" else {"messages": QUESTION, "max_tokens": 4}
    with toy.http.stream("POST", path, json={"model": "toy", "stream": True, **body, **PROGRESS}) as response:
        assert response.status_code == 200
        assert "prompt_progress" not in response.read().decode()


def test_a_prompt_that_does_not_fit_is_an_http_error_also_with_progress(toy: RunningServer) -> None:
    body = {**BODIES["/v1/completions"], "prompt": LONG * 20, **STREAM, **PROGRESS}
    assert toy.post("/v1/completions", **body).status_code == 400


def test_openai_client_reads_progress_and_the_same_message(toy: RunningServer) -> None:
    options: Any = {"messages": QUESTION, **GREEDY, "extra_body": PROGRESS | {"cache_prompt": False}}
    with OpenAI(base_url=f"{toy.url}/v1", api_key="none", max_retries=0) as client:
        plain = client.chat.completions.create(**options)
        with client.chat.completions.create(stream=True, **options) as chunks:
            told = [
                chunk.model_extra["prompt_progress"]
                for chunk in chunks
                if "prompt_progress" in (chunk.model_extra or {})
            ]
        with client.chat.completions.stream(**options) as streaming:
            streaming.until_done()
            final = streaming.current_completion_snapshot
    assert plain.usage
    assert told[-1]["processed"] == told[-1]["total"] == plain.usage.prompt_tokens
    assert final.choices[0].message.content == plain.choices[0].message.content
    assert final.choices[0].message.role == "assistant"


async def answered() -> Events:
    yield PromptProgress(0, total=5, cached=0, processed=0, ms=0.0)
    yield PromptProgress(0, total=5, cached=0, processed=5, ms=1.6)
    yield Delta(0, "far")
    yield Ended(0, "stop")
    yield Result(1, Stats(5, 0, 5, 1, "none", 0, 0, 0.0, 0.0, 1.0, 1.0, 1.0))


async def test_what_opens_a_stream_is_sent_with_the_first_progress() -> None:
    writing = AnswerStream(answered(), ChatWriter("toy"))
    written = [data.decode().split("\n\n")[:-1] async for data in writing.writes()]
    assert [len(write) for write in written] == [2, 1, 1, 1]
    told = json.loads(written[1][0].removeprefix("data: "))
    assert told["prompt_progress"] == {"total": 5, "cache": 0, "processed": 5, "time_ms": 2}
    assert told["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}]
