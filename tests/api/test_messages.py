"""Anthropic's Messages API, by the official client as its users use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic

from conftest import StartServer
from servers import Json, RunningServer, running_server, said

SYSTEM = "You keep the lighthouse and answer in one short sentence. "
QUESTION: Any = [{"role": "user", "content": "How far does the light reach?"}]
GREEDY: Any = {"model": "toy", "max_tokens": 24, "extra_body": {"temperature": 0}}
TOOL: Any = {
    "name": "look",
    "description": "Looks at the sea.",
    "input_schema": {"type": "object", "properties": {"where": {"type": "string"}}},
}
TOOLS_MODEL = ("--model", "toy=toy:template=tools")


def connect(server: RunningServer, key: str = "none", path: str = "") -> Anthropic:
    return Anthropic(base_url=server.url + path, api_key=key, max_retries=0)


@pytest.fixture
def client(toy: RunningServer) -> Iterator[Anthropic]:
    with connect(toy) as connected:
        yield connected


@pytest.fixture(scope="module")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Anthropic]:
    """A client of a server whose template has tools."""
    directory = tmp_path_factory.mktemp("tools") / "cache"
    with running_server(directory, *TOOLS_MODEL) as server, connect(server) as connected:
        yield connected


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def read(usage: Any) -> int:
    return int(usage.cache_read_input_tokens)


def test_an_answer_is_that_of_the_same_chat(client: Anthropic, toy: RunningServer) -> None:
    message = client.messages.create(system=SYSTEM, messages=QUESTION, **GREEDY)
    chat = toy.chat(QUESTION[0]["content"], system=SYSTEM)
    assert text_of(message) == said(chat)
    assert (message.type, message.role, message.model) == ("message", "assistant", "toy")
    assert message.id.startswith("msg_")
    assert message.usage.input_tokens + read(message.usage) == chat["usage"]["prompt_tokens"]
    assert message.usage.output_tokens == chat["usage"]["completion_tokens"]
    assert message._request_id


def test_blocks_of_text_are_paragraphs(client: Anthropic, toy: RunningServer) -> None:
    parts: Any = [{"type": "text", "text": "How far"}, {"type": "text", "text": "does it reach?"}]
    message = client.messages.create(
        system=[{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}],
        messages=[{"role": "user", "content": parts}],
        **GREEDY,
    )
    assert text_of(message) == said(toy.chat("How far\n\ndoes it reach?", system="One.\n\nTwo."))


def test_a_stream_is_the_same_message_in_named_events(client: Anthropic) -> None:
    whole = client.messages.create(system=SYSTEM, messages=QUESTION, **GREEDY)
    kinds = []
    with client.messages.stream(system=SYSTEM, messages=QUESTION, **GREEDY) as stream:
        for event in stream:
            kinds.append(event.type)
        streamed = stream.get_final_message()
    assert (text_of(streamed), streamed.stop_reason) == (text_of(whole), whole.stop_reason)
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    total = streamed.usage.input_tokens + read(streamed.usage)
    assert total == whole.usage.input_tokens + read(whole.usage)
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_events_on_the_wire_have_their_names_and_no_done(toy: RunningServer) -> None:
    body = {"model": "toy", "max_tokens": 3, "messages": QUESTION, "stream": True, "temperature": 0}
    text = toy.post("/v1/messages", **body).text
    blocks = [block.split("\n") for block in text.strip().split("\n\n") if not block.startswith(":")]
    names = [lines[0].removeprefix("event: ") for lines in blocks]
    told = [json.loads(lines[1].removeprefix("data: ")) for lines in blocks]
    assert names == [event["type"] for event in told]
    assert names[:2] == ["message_start", "ping"]
    start = told[0]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    assert told[-2]["usage"]["output_tokens"] == 3
    assert told[-2]["timings"]["predicted_n"] == 3
    assert "[DONE]" not in text


async def test_the_asynchronous_client_is_answered_and_streams(toy: RunningServer) -> None:
    async with AsyncAnthropic(base_url=toy.url, api_key="none", max_retries=0) as client:
        whole = await client.messages.create(system=SYSTEM, messages=QUESTION, **GREEDY)
        async with client.messages.stream(system=SYSTEM, messages=QUESTION, **GREEDY) as stream:
            pieces = [piece async for piece in stream.text_stream]
        assert "".join(pieces) == text_of(whole)


def test_a_stop_sequence_ends_the_answer_and_is_named(client: Anthropic) -> None:
    text = text_of(client.messages.create(messages=QUESTION, **GREEDY))
    stop = text[4:6]
    message = client.messages.create(messages=QUESTION, stop_sequences=["nowhere", stop], **GREEDY)
    assert text_of(message) == text.partition(stop)[0]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)


def test_why_an_answer_ended_is_told(client: Anthropic) -> None:
    cut = client.messages.create(messages=QUESTION, **{**GREEDY, "max_tokens": 1})
    assert (cut.stop_reason, cut.stop_sequence, cut.usage.output_tokens) == ("max_tokens", None, 1)
    reasons = {
        client.messages.create(
            **{**GREEDY, "max_tokens": 400}, messages=[{"role": "user", "content": f"{i}?"}]
        ).stop_reason
        for i in range(3)
    }
    assert reasons == {"end_turn"}


@pytest.mark.parametrize("stream", [False, True])
def test_no_tokens_may_be_asked_for(client: Anthropic, stream: bool) -> None:
    """To have a prompt computed before it is needed."""
    ask: Any = {"model": "toy", "max_tokens": 0, "messages": QUESTION}
    if stream:
        with client.messages.stream(**ask) as events:
            message = events.get_final_message()
    else:
        message = client.messages.create(**ask)
    assert (message.content, message.stop_reason, message.usage.output_tokens) == ([], "max_tokens", 0)


def test_a_cache_is_named_by_the_body_or_the_model(client: Anthropic, toy: RunningServer) -> None:
    toy.create("messages-keeper", SYSTEM)
    body = GREEDY["extra_body"] | {"use_cache": "messages-keeper"}
    named = client.messages.create(messages=QUESTION, **GREEDY | {"extra_body": body})
    by_model = client.messages.create(messages=QUESTION, **GREEDY | {"model": "toy@messages-keeper"})
    plain = client.messages.create(system=SYSTEM, messages=QUESTION, **GREEDY)
    for message in (named, by_model):
        assert text_of(message) == text_of(plain)
        assert message.usage.model_extra == {"cache_hit": True, "cached_prompts": ["messages-keeper"]}
        assert read(message.usage) > 40
    assert by_model.model == "toy@messages-keeper"
    counted = client.messages.count_tokens(
        model="toy", messages=QUESTION, extra_body={"use_cache": "messages-keeper"}
    )
    assert counted.input_tokens == named.usage.input_tokens + read(named.usage)


def test_why_a_cache_was_used_is_told_when_asked(client: Anthropic, toy: RunningServer) -> None:
    toy.create("messages-why", SYSTEM)
    body = GREEDY["extra_body"] | {"use_cache": "messages-why", "explain_cache": True}
    message = client.messages.create(messages=QUESTION, **GREEDY | {"extra_body": body})
    assert (message.model_extra or {})["cache_explanation"]["closest_cache"] == "messages-why"


def test_counted_tokens_are_those_of_the_request(tooled: Anthropic) -> None:
    prompt: Any = {"model": "toy", "system": SYSTEM, "messages": QUESTION, "tools": [TOOL]}
    counted = tooled.messages.count_tokens(**prompt)
    message = tooled.messages.create(max_tokens=1, **prompt)
    assert counted.input_tokens == message.usage.input_tokens + read(message.usage)
    without = tooled.messages.count_tokens(model="toy", system=SYSTEM, messages=QUESTION)
    assert without.input_tokens < counted.input_tokens - 50


def test_calls_and_their_results_are_the_chats_own(tooled: Anthropic) -> None:
    """The same as in a chat, where templates write them."""
    call: Any = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"where": "sea"}}
    result: Any = {"type": "tool_result", "tool_use_id": "toolu_1"}
    reasoning: Any = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
    turns: Any = [
        {"role": "user", "content": "Look!"},
        {"role": "assistant", "content": [reasoning, {"type": "text", "text": "I look."}, call]},
        {
            "role": "user",
            "content": [
                result | {"content": [{"type": "text", "text": "A ship."}]},
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    message = tooled.messages.create(messages=turns, tools=[TOOL], **GREEDY)
    arguments = {"name": "look", "arguments": json.dumps({"where": "sea"})}
    chat: Json = {
        "model": "toy",
        "max_tokens": 24,
        "temperature": 0,
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "look",
                    "description": TOOL["description"],
                    "parameters": TOOL["input_schema"],
                },
            }
        ],
        "messages": [
            {"role": "user", "content": "Look!"},
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [{"id": "toolu_1", "type": "function", "function": arguments}],
            },
            {"role": "tool", "tool_call_id": "toolu_1", "name": "look", "content": "A ship."},
            {"role": "user", "content": "And?"},
        ],
    }
    answer = tooled.post("/v1/chat/completions", body=chat, cast_to=object)
    assert isinstance(answer, dict)
    assert text_of(message) == said(answer)
    total = message.usage.input_tokens + read(message.usage)
    assert total == answer["usage"]["prompt_tokens"]


def ask(client: Anthropic, **changed: Any) -> Any:
    return client.messages.create(**{"model": "toy", "max_tokens": 4, "messages": QUESTION} | changed)


def content(*blocks: Any) -> Any:
    return [{"role": "user", "content": list(blocks)}]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"messages": []}, "messages"),
        ({"messages": content()}, "messages"),
        ({"messages": content({"type": "image", "source": {"type": "url", "url": "x"}})}, "text only"),
        ({"messages": content({"type": "document", "source": {}})}, "text only"),
        ({"messages": content({"type": "nothing"})}, "text"),
        ({"messages": QUESTION * 2, "max_tokens": -1}, "max_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"extra_body": {"temperature": 1.5}}, "temperature"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [TOOL]}, "tool_choice"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "output_config"),
        ({"extra_body": {"use_cache": "../x"}}, "not a name"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "prompt is too long"),
    ],
)
def test_bad_requests_raise_the_clients_exception_and_say_what_to_change(
    client: Anthropic, changed: Any, words: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as raised:
        ask(client, **changed)
    body: Any = raised.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert words in body["error"]["message"]
    assert body["request_id"]
    assert body["request_id"] == raised.value.request_id


def test_hostile_arguments_of_tools_are_refused(toy: RunningServer) -> None:
    half = '{"type": "tool_use", "id": "1", "name": "x", "input": {"a": "\\ud800"}}'
    deep = '{"type": "tool_use", "id": "1", "name": "x", "input": ' + '{"a":' * 3000 + "1" + "}" * 3000 + "}"
    for block in (half, deep):
        turns = f'[{{"role": "assistant", "content": [{block}]}}, {{"role": "user", "content": "?"}}]'
        text = f'{{"model": "toy", "max_tokens": 1, "messages": {turns}}}'
        response = toy.http.post("/v1/messages", content=text)
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


def test_what_is_not_there_raises_not_found(client: Anthropic) -> None:
    for changed in ({"model": "none"}, {"extra_body": {"use_cache": "messages-none"}}):
        with pytest.raises(anthropic.NotFoundError) as raised:
            ask(client, **changed)
        body: Any = raised.value.body
        assert body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.NotFoundError) as raised:
        client.get("/v1/messages/batches", cast_to=object)
    assert raised.value.body["error"]["type"] == "not_found_error"


def test_what_is_harmless_is_accepted(client: Anthropic) -> None:
    message = client.messages.create(
        messages=QUESTION,
        metadata={"user_id": "me"},
        service_tier="auto",
        thinking={"type": "enabled", "budget_tokens": 1024},
        tool_choice={"type": "auto", "disable_parallel_tool_use": True},
        extra_headers={"anthropic-beta": "prompt-caching-2024-07-31"},
        **GREEDY | {"extra_body": {"temperature": 0, "top_p": 0.9, "top_k": 5, "unheard_of": [1]}},
    )
    assert message.stop_reason in ("end_turn", "max_tokens")


def test_keys_and_large_bodies_are_told_in_the_same_shape(start_server: StartServer, tmp_path: Path) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text('max_body_mb = 0.01\nmodels = {toy = "toy:"}\n[keys.me]\nkey = "k"\n')
    server = start_server("--config", str(config))
    with connect(server, key="wrong") as client, pytest.raises(anthropic.AuthenticationError) as refused:
        ask(client)
    assert refused.value.body["error"]["type"] == "authentication_error"
    with connect(server, key="k") as client:
        assert ask(client).type == "message"
        with pytest.raises(anthropic.RequestTooLargeError) as large:
            ask(client, messages=[{"role": "user", "content": "x" * 20000}])
    assert large.value.body["error"]["type"] == "request_too_large"


def _read_until_the_worker_dies(server: RunningServer, stream: Any) -> None:
    for n, _ in enumerate(stream.text_stream):
        if n == 3:
            server.workers()[0].kill()


def test_an_error_after_the_start_is_an_event_that_the_client_raises(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=20,eos=0")
    ask: Any = {"model": "toy", "max_tokens": 400, "messages": QUESTION}
    with (
        connect(server) as client,
        client.messages.stream(**ask) as stream,
        pytest.raises(anthropic.APIStatusError) as raised,
    ):
        _read_until_the_worker_dies(server, stream)
    body: Any = raised.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "overloaded_error")


def test_an_answer_that_is_begun_is_continued(client: Anthropic, toy: RunningServer) -> None:
    begun: Any = [*QUESTION, {"role": "assistant", "content": "As far as"}]
    message = client.messages.create(messages=begun, **GREEDY)
    chat = toy.post("/v1/chat/completions", model="toy", messages=begun, temperature=0, max_tokens=24)
    assert text_of(message) == said(chat.json())


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "look"}])
def test_a_call_that_must_be_made_is_a_block_of_its_own(tooled: Anthropic, choice: Any) -> None:
    request: Any = {"messages": QUESTION, "tools": [TOOL], "tool_choice": choice, **GREEDY, "max_tokens": 300}
    message = tooled.messages.create(**request)
    assert message.stop_reason == "tool_use"
    calls = [block for block in message.content if block.type == "tool_use"]
    assert calls
    assert {call.name for call in calls} == {"look"}
    assert all(isinstance(call.input, dict) for call in calls)
    with tooled.messages.stream(**request) as stream:
        streamed = stream.get_final_message()
    assert [block.input for block in streamed.content if block.type == "tool_use"] == [
        call.input for call in calls
    ]


def test_an_answer_matches_the_schema_that_it_must_have(client: Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"miles": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["miles"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "schema": schema}}
    message = ask(client, output_config=form, max_tokens=200)
    assert message.stop_reason == "end_turn"
    assert 0 <= json.loads(text_of(message))["miles"] <= 99
