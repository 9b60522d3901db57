"""The official client of OpenAI, as its users use it: the named cache goes into `extra_body`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from conftest import StartServer
from servers import RunningServer

SYSTEM = "You are the keeper of a lighthouse and answer in one short sentence. "
CACHED = "lighthouse"
USE_CACHE = {"use_cache": CACHED}
QUESTION: Any = [{"role": "user", "content": "How far does the light reach?"}]
GREEDY: Any = {"temperature": 0, "max_tokens": 24}


def connect(server: RunningServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def client(toy: RunningServer) -> Iterator[OpenAI]:
    toy.create(CACHED, SYSTEM)
    with connect(toy) as connected:
        yield connected


def check_hit(usage: Any) -> None:
    assert usage.model_extra["cache_hit"] is True
    assert usage.model_extra["cached_prompts"] == [CACHED]
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_chat_starts_from_a_named_cache(client: OpenAI) -> None:
    named = client.chat.completions.create(model="toy", messages=QUESTION, extra_body=USE_CACHE, **GREEDY)
    check_hit(named.usage)
    in_full: Any = [{"role": "system", "content": SYSTEM}, *QUESTION]
    plain = client.chat.completions.create(model="toy", messages=in_full, **GREEDY)
    assert named.choices[0].message.content == plain.choices[0].message.content
    assert plain.usage
    assert "cache_hit" not in (plain.usage.model_extra or {})


def test_a_completion_starts_from_a_named_cache(client: OpenAI) -> None:
    named = client.completions.create(model="toy", prompt="The light", extra_body=USE_CACHE, **GREEDY)
    check_hit(named.usage)
    plain = client.completions.create(model="toy", prompt=SYSTEM + "The light", **GREEDY)
    assert named.choices[0].text == plain.choices[0].text


def test_a_streamed_chat_is_the_same_text_in_well_formed_chunks(client: OpenAI) -> None:
    options: Any = {"model": "toy", "messages": QUESTION, "extra_body": USE_CACHE, **GREEDY}
    whole = client.chat.completions.create(**options)
    with client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **options
    ) as stream:
        *chunks, last = stream
    assert len({(chunk.id, chunk.created, chunk.object) for chunk in (*chunks, last)}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason]
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    check_hit(last.usage)


def test_a_streamed_completion_is_the_same_text(client: OpenAI) -> None:
    options: Any = {"model": "toy", "prompt": "The light", "extra_body": USE_CACHE, **GREEDY}
    whole = client.completions.create(**options)
    with client.completions.create(stream=True, stream_options={"include_usage": True}, **options) as stream:
        *chunks, last = stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    check_hit(last.usage)


def test_a_stream_has_no_usage_unless_it_was_asked_for(client: OpenAI) -> None:
    with client.chat.completions.create(
        model="toy", messages=QUESTION, stream=True, extra_body=USE_CACHE, **GREEDY
    ) as stream:
        chunks = list(stream)
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)


async def test_the_asynchronous_client_gets_the_same_answers(toy: RunningServer, client: OpenAI) -> None:
    options: Any = {"model": "toy", "messages": QUESTION, "extra_body": USE_CACHE, **GREEDY}
    expected = client.chat.completions.create(**options).choices[0].message.content
    async with AsyncOpenAI(base_url=f"{toy.url}/v1", api_key="none", max_retries=0) as asynchronous:
        whole = await asynchronous.chat.completions.create(**options)
        stream = await asynchronous.chat.completions.create(stream=True, **options)
        async with stream:
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    check_hit(whole.usage)
    assert whole.choices[0].message.content == expected
    assert "".join(pieces) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_cache_that_does_not_exist_is_a_not_found_error(client: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(
            model="toy", messages=QUESTION, stream=stream, extra_body={"use_cache": "never-made"}
        )
    assert caught.value.code == "cache_not_found"
    assert caught.value.param == "use_cache"
    assert caught.value.request_id


def test_a_model_that_does_not_exist_is_a_not_found_error(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-17", messages=QUESTION)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-17")


def test_a_value_out_of_range_is_a_bad_request_error(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="toy", messages=QUESTION, temperature=9)
    assert (caught.value.code, caught.value.param) == ("invalid_value", "temperature")
    assert caught.value.type == "invalid_request_error"


def test_a_prompt_beyond_the_context_is_a_bad_request_error_with_both_figures(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="toy", prompt="x" * 5000)
    assert caught.value.code == "context_length_exceeded"
    assert isinstance(caught.value.body, dict)
    assert (caught.value.body["n_prompt_tokens"], caught.value.body["n_ctx"]) == (5001, 4096)


def test_an_engine_that_dies_in_mid_answer_is_an_api_error(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=5,eos=0")
    with (
        connect(server) as client,
        client.chat.completions.create(model="toy", messages=QUESTION, stream=True) as stream,
    ):
        chunks = iter(stream)
        next(chunk for chunk in chunks if chunk.choices[0].delta.content)
        server.workers()[0].kill()
        with pytest.raises(openai.APIError) as caught:
            list(chunks)
    assert caught.value.code == "engine_died"


def test_models_and_their_aliases_are_listed_and_found(client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert {"toy", "qwen3-0.6b"} <= set(names)
    for name in names:
        model = client.models.retrieve(name)
        assert (model.id, model.object) == (name, "model")
        assert model.created > 0


@pytest.mark.real_model
def test_the_real_model_answers_the_client_from_a_named_cache(real: RunningServer) -> None:
    real.create(CACHED, SYSTEM, model="smollm2")
    options: Any = {"model": "smollm2", "messages": QUESTION, "extra_body": USE_CACHE, **GREEDY}
    with connect(real) as client:
        whole = client.chat.completions.create(**options)
        with client.chat.completions.create(
            stream=True, stream_options={"include_usage": True}, **options
        ) as stream:
            *chunks, last = stream
    check_hit(whole.usage)
    check_hit(last.usage)
    assert whole.choices[0].message.content
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
