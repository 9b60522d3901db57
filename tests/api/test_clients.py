"""Clients from PyPI, as their users set them up, against the real model: each starts from a named cache."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from anthropic import Anthropic
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from servers import RunningServer

# litellm would fetch prices when it is imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

pytestmark = [
    pytest.mark.real_model,
    # What clients warn of is theirs.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(180),
]

SYSTEM = "You are the keeper of a lighthouse on a small island and answer in one short sentence. " * 4
NAME = "clients"
USE_CACHE = {"use_cache": NAME}
QUESTION: Any = [{"role": "user", "content": "How far does the light reach?"}]
LIMITS: Any = {"temperature": 0, "max_tokens": 16}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Light(BaseModel):
    color: Literal["red", "green", "white"]
    miles: int = Field(ge=0, le=99)


@pytest.fixture(scope="module")
def server(real: RunningServer) -> RunningServer:
    real.create(NAME, SYSTEM, model="smollm2")
    return real


@pytest.fixture(scope="module")
def client(server: RunningServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def answer(client: OpenAI) -> str:
    """Without a cache."""
    messages: Any = [{"role": "system", "content": SYSTEM}, *QUESTION]
    done = client.chat.completions.create(
        model="smollm2", messages=messages, extra_body={"cache_prompt": False}, **LIMITS
    )
    assert done.choices[0].message.content
    return done.choices[0].message.content


def hits(server: RunningServer) -> int:
    found = server.http.get(f"/v1/cache/smollm2/{NAME}").json()
    return int(found["hits"])


def check_hit(usage: Any) -> None:
    assert usage.model_extra["cache_hit"] is True
    assert usage.model_extra["cached_prompts"] == [NAME]
    assert usage.prompt_tokens_details.cached_tokens > 50


def test_openai_answers_from_the_cache(client: OpenAI, answer: str) -> None:
    done = client.chat.completions.create(model="smollm2", messages=QUESTION, extra_body=USE_CACHE, **LIMITS)
    assert done.choices[0].message.content == answer
    check_hit(done.usage)


def test_openai_streams_the_same_answer(client: OpenAI, answer: str) -> None:
    with client.chat.completions.create(
        model=f"smollm2@{NAME}",
        messages=QUESTION,
        stream=True,
        stream_options={"include_usage": True},
        **LIMITS,
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answer
    check_hit(chunks[-1].usage)


async def test_openai_asynchronously_gets_the_same_answers_to_requests_at_once(
    server: RunningServer, answer: str
) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        request: Any = {"model": "smollm2", "messages": QUESTION, "extra_body": USE_CACHE, **LIMITS}
        done = await asyncio.gather(*(client.chat.completions.create(**request) for _ in range(2)))
    for each in done:
        check_hit(each.usage)
    assert answer in {each.choices[0].message.content for each in done}


@pytest.mark.parametrize("cache", [USE_CACHE, {"cache_prompt": False}])
def test_openai_parses_what_it_asked_to_be_structured(client: OpenAI, cache: dict[str, Any]) -> None:
    done = client.chat.completions.parse(
        model="smollm2",
        messages=QUESTION,
        response_format=Light,
        extra_body=cache,
        temperature=0,
        max_tokens=60,
    )
    assert done.choices[0].finish_reason == "stop"
    assert isinstance(done.choices[0].message.parsed, Light)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_openai_gets_calls_of_its_tools(client: OpenAI, choice: Any) -> None:
    request: Any = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "What is the weather in Oslo?"}],
        "tools": [WEATHER],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 80,
    }
    whole = client.chat.completions.create(**request)
    (call,) = whole.choices[0].message.tool_calls or []
    assert call.function.name == "get_weather"
    assert isinstance(json.loads(call.function.arguments)["city"], str)
    assert whole.choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(**request) as stream:
        for _ in stream:
            pass
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert streamed.function.arguments == call.function.arguments
    answered = client.chat.completions.create(
        model="smollm2",
        messages=[
            *request["messages"],
            whole.choices[0].message,
            {"role": "tool", "tool_call_id": call.id, "content": "Rain, 4 degrees"},
        ],
        tools=[WEATHER],
        **LIMITS,
    )
    assert answered.choices[0].message.content


def test_openai_responses_go_on_from_each_other(client: OpenAI) -> None:
    first = client.responses.create(
        model="smollm2", input="Say a word.", temperature=0, max_output_tokens=16, extra_body=USE_CACHE
    )
    assert first.output_text
    second = client.responses.create(
        model="smollm2",
        input="And another one.",
        previous_response_id=first.id,
        temperature=0,
        max_output_tokens=16,
    )
    assert second.output_text
    assert second.usage
    assert second.usage.input_tokens_details.cached_tokens > 50


def test_openai_embeds(client: OpenAI) -> None:
    done = client.embeddings.create(model="smollm2", input=["a light", "a house"])
    assert len(done.data) == 2
    assert len(done.data[0].embedding) == len(done.data[1].embedding) > 100


def test_anthropic_reads_what_it_marked_to_be_cached(server: RunningServer) -> None:
    client = Anthropic(base_url=server.url, api_key="none", max_retries=0)
    text = "Be kind. " + SYSTEM * 3
    system: Any = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]
    request: Any = {
        "model": "smollm2",
        "system": system,
        "messages": QUESTION,
        "max_tokens": 16,
        "extra_body": {"temperature": 0},
    }
    created = client.messages.create(**request)
    n_created = created.usage.cache_creation_input_tokens or 0
    assert n_created > 100
    read = client.messages.create(**request)
    assert (read.usage.cache_read_input_tokens or 0) >= n_created
    assert read.usage.cache_creation_input_tokens == 0
    assert read.content == created.content
    with client.messages.stream(**request) as stream:
        assert "".join(stream.text_stream) == getattr(read.content[0], "text", None)


def test_anthropic_starts_from_a_named_cache(server: RunningServer, answer: str) -> None:
    client = Anthropic(base_url=server.url, api_key="none", max_retries=0)
    done = client.messages.create(
        model="smollm2", messages=QUESTION, max_tokens=16, extra_body=USE_CACHE | {"temperature": 0}
    )
    assert getattr(done.content[0], "text", None) == answer
    assert (done.usage.cache_read_input_tokens or 0) > 50


def test_litellm_answers_from_the_cache(server: RunningServer, answer: str) -> None:
    import litellm

    options: Any = {"api_base": f"{server.url}/v1", "api_key": "none", "messages": QUESTION, **LIMITS}
    done = litellm.completion(model="openai/smollm2", extra_body=USE_CACHE, **options)
    assert done.choices[0].message.content == answer
    assert done.usage.prompt_tokens_details.cached_tokens > 50
    stream = litellm.completion(model=f"openai/smollm2@{NAME}", stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer


def test_langchain_answers_from_the_cache(server: RunningServer, answer: str) -> None:
    from langchain_openai import ChatOpenAI

    options: Any = {"base_url": f"{server.url}/v1", "api_key": "none", "extra_body": USE_CACHE}
    model = ChatOpenAI(model="smollm2", temperature=0, max_tokens=16, **options)
    done = model.invoke(QUESTION[0]["content"])
    assert done.content == answer
    assert done.usage_metadata
    assert done.usage_metadata["input_token_details"]["cache_read"] > 50
    assert "".join(str(chunk.content) for chunk in model.stream(QUESTION[0]["content"])) == answer
    longer = model.model_copy(update={"max_tokens": 60})
    light = longer.with_structured_output(Light).invoke(QUESTION[0]["content"])
    assert isinstance(light, Light)
    called = longer.bind_tools([WEATHER], tool_choice="get_weather").invoke("The weather in Oslo?")
    assert called.tool_calls[0]["name"] == "get_weather"


def test_instructor_gets_its_models_filled_in(client: OpenAI) -> None:
    import instructor

    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        light = instructor.from_openai(client, mode=mode).chat.completions.create(
            model="smollm2",
            messages=QUESTION,
            response_model=Light,
            max_retries=0,
            temperature=0,
            max_tokens=80,
            extra_body=USE_CACHE,
        )
        assert isinstance(light, Light)


def test_llm_on_the_command_line_answers_from_the_cache(
    server: RunningServer, answer: str, tmp_path: Path
) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: keeper\n  model_name: smollm2@{NAME}\n  api_base: {server.url}/v1\n"
    )
    before = hits(server)
    options = ["-o", "temperature", "0", "-o", "max_tokens", "16"]
    for more in ([], ["--no-stream"]):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "llm",
                "-m",
                "keeper",
                "--key",
                "none",
                *options,
                *more,
                QUESTION[0]["content"],
            ],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"LLM_USER_PATH": str(tmp_path)},
            timeout=100,
        )
        assert done.stdout.strip() == answer.strip()
    assert hits(server) == before + 2
