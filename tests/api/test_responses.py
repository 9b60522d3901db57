"""POST /v1/responses: OpenAI's Responses API, whose stored responses go on from their states."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI, omit
from openai._models import construct_type_unchecked
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent

from conftest import StartServer
from headstart.api.responses.response import ResponseWriter
from headstart.prompt.answer_parts import CallDelta
from headstart.protocol import Stats
from headstart.service.interface.answer import Choice, Delta, Ended, Result
from headstart.service.origins.responses import answer_message
from servers import Json, RunningServer, eventually, running_server, said

PATH = "/v1/responses"
KEEPER = "You keep the lighthouse and tell what you see in one line. " * 9


def _post(server: RunningServer, **body: Any) -> httpx.Response:
    fields = {"model": "toy", "temperature": 0, "max_output_tokens": 24, **body}
    # httpx's own JSON would not have half a surrogate pair.
    return server.http.post(PATH, content=json.dumps(fields))


def _ask(server: RunningServer, content: str | list[Json], **body: Any) -> Json:
    response = _post(server, input=content, **body)
    assert response.status_code == 200, response.text
    return response.json()


def _refused(server: RunningServer, **body: Any) -> Json:
    response = _post(server, **{"input": "Who?", **body})
    assert response.status_code == 400, response.text
    error: Json = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


def _text(response: Json) -> str:
    (item,) = response["output"]
    (part,) = item["content"]
    assert (item["type"], part["type"]) == ("message", "output_text")
    return str(part["text"])


def _user(text: str) -> Json:
    return {"role": "user", "content": text}


def _streamed(server: RunningServer, **body: Any) -> list[Json]:
    fields = {"model": "toy", "temperature": 0, "max_output_tokens": 24, "stream": True, **body}
    found = []
    with server.http.stream("POST", PATH, json=fields) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        text = "".join(response.iter_text())
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def test_a_response_says_what_a_chat_with_the_same_messages_says(toy: RunningServer) -> None:
    response = _ask(toy, "What do you see?", instructions=KEEPER)
    chat = toy.chat("What do you see?", system=KEEPER)
    assert _text(response) == said(chat)
    assert response["object"] == "response"
    usage = response["usage"]
    assert usage["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == chat["usage"]["completion_tokens"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}


def test_items_are_the_messages_of_a_chat(toy: RunningServer) -> None:
    parts = [{"type": "input_text", "text": "What "}, {"type": "input_text", "text": "else?"}]
    items: list[Json] = [
        {"role": "developer", "content": KEEPER},
        {"type": "message", "role": "user", "content": "One?"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "A ship.", "annotations": []}],
        },
        {"role": "user", "content": parts},
    ]
    messages = [
        {"role": "system", "content": KEEPER},
        _user("One?"),
        {"role": "assistant", "content": "A ship."},
        _user("What else?"),
    ]
    chat = toy.post("/v1/chat/completions", model="toy", messages=messages, temperature=0, max_tokens=24)
    assert _text(_ask(toy, items)) == said(chat.json())


def test_the_next_response_starts_from_the_state_of_the_one_before_also_after_a_restart(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "toy=toy:")
    one = _ask(server, "One?", instructions=KEEPER)
    two = _ask(server, "Two?", instructions=KEEPER, previous_response_id=one["id"])
    assert two["previous_response_id"] == one["id"]
    assert two["usage"]["cache_hit"] is True
    assert two["usage"]["cached_prompts"] == [one["id"]]
    server.restart()
    three = _ask(server, "Three?", instructions=KEEPER, previous_response_id=two["id"])
    assert three["usage"]["cache_hit"] is True
    assert three["timings"]["cache_source"] == "file"
    assert three["timings"]["prompt_n"] < 40 < three["usage"]["input_tokens_details"]["cached_tokens"]
    turns = [_user("One?"), {"role": "assistant", "content": _text(one)}, _user("Two?")]
    turns += [{"role": "assistant", "content": _text(two)}, _user("Three?")]
    cold = _ask(server, turns, instructions=KEEPER, store=False, cache_prompt=False)
    assert _text(three) == _text(cold)
    assert three["usage"]["input_tokens"] == cold["usage"]["input_tokens"]


def test_two_responses_go_on_from_one(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    one = _ask(server, "One?", instructions=KEEPER)
    branches = [_ask(server, t, instructions=KEEPER, previous_response_id=one["id"]) for t in ("A?", "B?")]
    assert [branch["usage"]["cache_hit"] for branch in branches] == [True, True]
    assert _text(branches[0]) != _text(branches[1])


@pytest.mark.parametrize("instructions", ["You are a gull.", None])
def test_instructions_are_not_carried_on(start_server: StartServer, instructions: str | None) -> None:
    server = start_server("--model", "toy=toy:")
    one = _ask(server, "One?", instructions=KEEPER)
    two = _ask(server, "Two?", instructions=instructions, previous_response_id=one["id"])
    turns = [_user("One?"), {"role": "assistant", "content": _text(one)}, _user("Two?")]
    cold = _ask(server, turns, instructions=instructions, cache_prompt=False)
    assert _text(two) == _text(cold)
    assert two["usage"]["input_tokens"] == cold["usage"]["input_tokens"]
    assert two["usage"]["cache_hit"] is False
    assert two["usage"]["cache_miss_reason"] == "prompt_differs"


def test_instructions_take_the_place_of_the_configured_system_message(
    start_server: StartServer, tmp_path: Path
) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text(f'default_system = "{KEEPER}"\nautomatic = false\n[models]\ntoy = "toy:"\n')
    server = start_server("--config", str(config))
    one = _ask(server, "One?")
    two = _ask(server, "Two?", previous_response_id=one["id"])
    assert two["usage"]["cache_hit"] is True
    other = _ask(server, "Three?", instructions="You are a gull.", previous_response_id=two["id"])
    turns = [_user("One?"), {"role": "assistant", "content": _text(one)}, _user("Two?")]
    turns += [{"role": "assistant", "content": _text(two)}, _user("Three?")]
    assert _text(other) == _text(_ask(server, turns, instructions="You are a gull."))


def test_a_response_starts_from_a_named_cache_and_the_next_goes_on_with_it(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", KEEPER)
    one = _ask(server, "One?", use_cache="keeper")
    assert one["usage"]["cached_prompts"] == ["keeper"]
    assert _text(one) == said(server.chat("One?", use_cache="keeper"))
    assert _text(_ask(server, "One?", model="toy@keeper")) == _text(one)
    two = _ask(server, "Two?", use_cache="keeper", previous_response_id=one["id"])
    assert two["usage"]["cached_prompts"] == [one["id"]]
    told = _ask(server, "Two?", instructions="Shout.", use_cache="keeper", previous_response_id=one["id"])
    turns = [_user("One?"), {"role": "assistant", "content": _text(one)}, _user("Two?")]
    assert _text(told) == _text(_ask(server, turns, instructions="Shout.", use_cache="keeper"))
    server.create("other", "Another. " * 30)
    error = _refused(server, use_cache="other", previous_response_id=one["id"])
    assert error["param"] == "use_cache"
    assert "keeper" in error["message"]


def test_another_model_goes_on_with_the_text(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:", "--model", "two=toy:weights=other")
    one = _ask(server, "One?", instructions=KEEPER)
    two = _ask(server, "Two?", model="two", instructions=KEEPER, previous_response_id=one["id"])
    turns = [_user("One?"), {"role": "assistant", "content": _text(one)}, _user("Two?")]
    assert _text(two) == _text(_ask(server, turns, model="two", instructions=KEEPER))
    three = _ask(server, "Three?", model="two", instructions=KEEPER, previous_response_id=two["id"])
    assert three["usage"]["cache_hit"] is True


def test_a_response_is_shown_as_it_was_answered_until_it_is_deleted(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    one = _ask(server, "One?", metadata={"of": "tests"}, instructions=KEEPER)
    assert one["metadata"] == {"of": "tests"}
    assert server.http.get(f"{PATH}/{one['id']}").json() == one
    server.restart()
    assert server.http.get(f"{PATH}/{one['id']}").json() == one
    assert server.http.delete(f"{PATH}/{one['id']}").json() == {
        "id": one["id"],
        "object": "response",
        "deleted": True,
    }
    assert server.files() == []
    for gone in (server.http.get(f"{PATH}/{one['id']}"), server.http.delete(f"{PATH}/{one['id']}")):
        assert gone.status_code == 404
        assert gone.json()["error"]["code"] == "response_not_found"


def test_nothing_is_kept_of_a_response_that_is_not_to_be_stored(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    one = _ask(server, "One?", store=False)
    assert one["store"] is False
    assert server.http.get(f"{PATH}/{one['id']}").status_code == 404
    response = _post(server, input="Two?", previous_response_id=one["id"])
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")
    server.stop()
    assert server.files() == []
    server.start()


@pytest.mark.parametrize("name", ["resp_0", "../toy", "", "x" * 5000, "\u00e4", "resp_1\n"])
def test_an_unknown_response_is_not_found(toy: RunningServer, name: str) -> None:
    response = _post(toy, input="Two?", previous_response_id=name)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "previous_response_not_found"


def test_stored_responses_are_not_among_the_caches_and_end_in_time(
    start_server: StartServer, tmp_path: Path
) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text('responses_ttl_seconds = 3\n[models]\ntoy = "toy:"\n')
    server = start_server("--config", str(config))
    one = _ask(server, "One?", instructions=KEEPER)
    assert server.http.get(f"{PATH}/{one['id']}").status_code == 200
    listed = server.http.get("/v1/cache").json()
    assert (listed["data"], listed["responses"]) == ([], 1)
    assert [model["id"] for model in server.http.get("/v1/models").json()["data"]] == ["toy"]
    assert server.http.get(f"/v1/cache/toy/{one['id']}").json()["origin"] == "response"
    eventually(lambda: server.http.get(f"{PATH}/{one['id']}").status_code == 404)


def test_a_stored_response_may_be_pinned_but_not_lose_what_it_was(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    one = _ask(server, "One?")
    path = f"/v1/cache/toy/{one['id']}"
    assert server.http.get(f"{PATH}/{one['id']}").json() == one
    assert server.http.patch(path, json={"pinned": True, "ttl_seconds": None}).json()["expires"] is None
    assert server.http.patch(path, json={"metadata": {}}).status_code == 400
    assert server.http.get(f"{PATH}/{one['id']}").json() == one


def test_a_response_whose_client_left_is_not_kept(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:eos=0,ms_per_token=5")
    body = {"model": "toy", "input": "One?", "stream": True}
    with server.http.stream("POST", PATH, json=body) as response:
        assert next(response.iter_lines()) == "event: response.created"
    assert _ask(server, "Two?", store=False)["status"] == "incomplete"
    server.stop()
    assert server.files() == []
    server.start()


def test_a_response_is_deleted_at_once_while_it_is_being_saved(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=2")
    one = _ask(server, "One?", instructions=KEEPER)
    assert server.http.delete(f"{PATH}/{one['id']}").status_code == 200
    assert server.http.get(f"{PATH}/{one['id']}").status_code == 404
    assert server.files() == []


@pytest.mark.parametrize(("quota", "with_states"), [(0, 0), (0.007, 1)])
def test_responses_without_room_for_their_states_go_on_with_their_text(
    start_server: StartServer, tmp_path: Path, quota: float, with_states: int
) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text(f'responses_quota_mb = {quota}\nresponses_kept = 3\n[models]\ntoy = "toy:"\n')
    server = start_server("--config", str(config))
    found = [_ask(server, "One?", instructions=KEEPER)]
    for turn in range(3):
        more = _ask(server, f"{turn}?", instructions=KEEPER, previous_response_id=found[-1]["id"])
        found.append(more)
    eventually(lambda: server.http.get(f"{PATH}/{found[0]['id']}").status_code == 404)
    gone = [["chat"]] * (3 - with_states) + [[]] * with_states
    eventually(lambda: _evicted(server, found[1:]) == gone)
    turns: list[Json] = [_user("One?"), {"role": "assistant", "content": _text(found[0])}, _user("0?")]
    turns += [{"role": "assistant", "content": _text(found[1])}, _user("Now?")]
    unstored: Any = {"instructions": KEEPER, "store": False}
    branch = _ask(server, "Now?", previous_response_id=found[1]["id"], **unstored)
    assert branch["usage"]["cache_miss_reason"] == "evicted"
    assert _text(branch) == _text(_ask(server, turns, cache_prompt=False, **unstored))
    eventually(lambda: server.http.get("/health").json()["caches_building"] == 0)
    assert _evicted(server, found[1:2]) == [["chat"]]


def _evicted(server: RunningServer, responses: list[Json]) -> list[Any]:
    return [server.http.get(f"/v1/cache/toy/{each['id']}").json().get("evicted") for each in responses]


def test_responses_are_the_first_to_give_up_their_states(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:", "--quota-mb", "0.1")
    server.create("keeper", KEEPER)
    for turn in range(6):
        _ask(server, f"{turn} {KEEPER * 4}")
    eventually(lambda: server.http.get("/v1/cache").json()["evictions"] > 0)
    assert server.http.get("/v1/cache/toy/keeper").json()["evicted"] == []


@pytest.mark.slow
def test_a_key_has_responses_of_its_own(tmp_path: Path) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text(
        '[models]\ntoy = "toy:"\n[keys.ann]\nkey = "ann-secret"\n[keys.bob]\nkey = "bob-secret"\n'
    )
    with running_server(tmp_path / "cache", "--config", str(config)) as server:
        ann, bob = ({"authorization": f"Bearer {name}-secret"} for name in ("ann", "bob"))
        body = {"model": "toy", "input": "One?", "max_output_tokens": 8}
        one = server.http.post(PATH, json=body, headers=ann).json()
        again = body | {"previous_response_id": one["id"]}
        assert server.http.post(PATH, json=again, headers=ann).json()["usage"]["cache_hit"] is True
        refused = server.http.post(PATH, json=again, headers=bob)
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "previous_response_not_found"
        for method in ("GET", "DELETE"):
            response = server.http.request(method, f"{PATH}/{one['id']}", headers=bob)
            assert response.status_code == 404
        assert server.http.get(f"{PATH}/{one['id']}", headers=ann).json() == one


def test_a_stream_is_the_same_response_in_events_of_their_names(toy: RunningServer) -> None:
    whole = _ask(toy, "What do you see?", instructions=KEEPER)
    events = _streamed(toy, input="What do you see?", instructions=KEEPER)
    kinds = [event["type"] for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        kinds[-1],
    ]
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == _text(whole)
    assert events[0]["response"]["output"] == []
    last = events[-1]["response"]
    assert kinds[-1] == f"response.{last['status']}" == f"response.{whole['status']}"
    assert _text(last) == text
    assert {e["item_id"] for e in events if "item_id" in e} == {last["output"][0]["id"]}
    assert last.keys() == whole.keys()
    assert toy.http.get(f"{PATH}/{last['id']}").json() == last


def test_an_answer_cut_by_its_limit_is_incomplete_and_goes_on_all_the_same(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:eos=0")
    one = _ask(server, "One?", max_output_tokens=5)
    assert one["status"] == "incomplete"
    assert one["incomplete_details"] == {"reason": "max_output_tokens"}
    assert one["output"][0]["status"] == "incomplete"
    assert one["usage"]["output_tokens"] == 5
    events = _streamed(server, input="One?", max_output_tokens=5, previous_response_id=one["id"])
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["usage"]["cache_hit"] is True


def test_a_response_that_fails_under_way_ends_its_stream_with_failed(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:eos=0,ms_per_token=20")
    body = {"model": "toy", "input": "One?", "stream": True}
    with server.http.stream("POST", PATH, json=body) as response:
        lines = response.iter_lines()
        for line in lines:
            if line == "event: response.output_text.delta":
                break
        server.workers()[0].kill()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert events[-1]["type"] == "response.failed"
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    assert failed["output"][0]["status"] == "incomplete"
    assert server.http.get(f"{PATH}/{failed['id']}").status_code == 404


def test_what_a_parser_finds_in_an_answer_become_items() -> None:
    """No model here calls functions by itself, so the deltas are made up."""
    writer = ResponseWriter("resp_1", {})
    deltas: list[Delta | Ended] = [
        Delta(0, reasoning="Hm"),
        Delta(0, reasoning="m."),
        Delta(0, text="Let me look."),
        Delta(0, call=CallDelta(0, "call_1", "look")),
        Delta(0, call=CallDelta(0, arguments='{"to": ')),
        Delta(0, call=CallDelta(0, arguments='"sea"}')),
        Delta(0, call=CallDelta(1, "call_2", "look", "{}")),
        Ended(0, "tool_calls"),
    ]
    answer = Choice(0)
    data = b"".join(writer.opening())
    for delta in deltas:
        answer.add(delta)
        data += b"".join(writer.add(delta))
    stats = Stats(9, 4, 5, 7, "slot", 0, 0, 0, 0, 0, 0, 0)
    data += b"".join(writer.closing(Result(7, stats, n_reasoning=2)))
    events = [json.loads(line[6:]) for line in data.decode().splitlines() if line.startswith("data: ")]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    state: Any = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in events:
        kind: Any = ResponseStreamEvent
        seen = state.handle_event(construct_type_unchecked(type_=kind, value=event))
    body = events[-1]["response"]
    assert seen[-1].response.output_text == "Let me look."
    assert [(item["type"], item["status"]) for item in body["output"]] == [
        ("reasoning", "completed"),
        ("message", "completed"),
        ("function_call", "completed"),
        ("function_call", "completed"),
    ]
    assert body["output"][0]["content"] == [{"type": "reasoning_text", "text": "Hmm."}]
    calls = [(item["call_id"], item["name"], item["arguments"]) for item in body["output"][2:]]
    assert calls == [("call_1", "look", '{"to": "sea"}'), ("call_2", "look", "{}")]
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds.count("function_call_arguments.delta") == 3
    assert kinds.count("function_call_arguments.done") == 2
    assert kinds.count("reasoning_text.delta") == 2
    for event in events:
        if event["type"].startswith("response.output_item"):
            assert event["item"]["id"] == body["output"][event["output_index"]]["id"]
    assert body["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    message = answer_message(answer)
    assert message["content"] == "Let me look."
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == [{"to": "sea"}, {}]


TOOL = {
    "type": "function",
    "name": "look",
    "description": "Look out.",
    "parameters": {"type": "object", "properties": {}},
}


def test_tools_and_their_calls_are_written_as_in_a_chat(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:template=tools")
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"to": "sea"}'}}
    function = {k: TOOL[k] for k in ("name", "description", "parameters")}
    messages = [
        _user("Look."),
        {"role": "assistant", "content": "", "tool_calls": [call, call | {"id": "c2"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "A ship."},
        {"role": "tool", "tool_call_id": "c2", "content": "A gull."},
    ]
    chat = server.post(
        "/v1/chat/completions",
        model="toy",
        messages=messages,
        tools=[{"type": "function", "function": function}],
        temperature=0,
        max_tokens=24,
    ).json()
    named = {"type": "function_call", "name": "look", "arguments": '{"to": "sea"}'}
    items = [
        _user("Look."),
        named | {"call_id": "c1"},
        named | {"call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "A ship."},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "A gull."}],
        },
    ]
    response = _ask(server, items, tools=[TOOL])
    assert response["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert _text(response) == said(chat)
    assert response["tools"] == [TOOL | {"strict": None}]
    assert _ask(server, "Go on.", tools=[TOOL], previous_response_id=response["id"])["usage"]["cache_hit"]
    without = _ask(server, "Go on.", previous_response_id=response["id"])
    assert without["usage"]["cache_miss_reason"] == "prompt_differs"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"messages": [_user("Who?")]}, "messages"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "text.format"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "look"}}, "tool_choice"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"input": [{"type": ["message"]}]}, "input.0.message.type"),
        ({"input": ["Who?"]}, "input.0.message"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.message.content"),
        ({"input": "\ud800"}, "input"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "", "arguments": ""}]},
            "input.0.function_call.name",
        ),
        ({"max_output_tokens": 10**40}, "max_output_tokens"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"input": "x" * 6000}, "input"),
    ],
    ids=range(26),
)
def test_what_would_change_the_answer_and_cannot_be_done_is_refused(
    toy: RunningServer, body: Json, param: str
) -> None:
    error = _refused(toy, **body)
    assert error["param"] == param, error


def test_what_asks_for_nothing_is_accepted(toy: RunningServer) -> None:
    _ask(
        toy,
        "Who?",
        background=False,
        truncation="disabled",
        include=["reasoning.encrypted_content"],
        reasoning={"effort": "low", "summary": None},
        text={"format": {"type": "text"}, "verbosity": "low"},
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=True,
        service_tier="auto",
        user="someone",
        prompt_cache_key="key",
        safety_identifier="id",
        metadata=None,
        something_new={"a": 1},
    )


def test_an_explanation_is_told_with_the_response(toy: RunningServer) -> None:
    assert "reason" in _ask(toy, "Who?", explain_cache=True)["cache_explanation"]


@pytest.fixture
def client(toy: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{toy.url}/v1", api_key="none", max_retries=0) as connected:
        yield connected


GREEDY: Any = {"model": "toy", "temperature": 0, "max_output_tokens": 400}


def test_openais_client_creates_goes_on_shows_and_deletes(client: OpenAI) -> None:
    one = client.responses.create(input="One?", instructions=KEEPER, **GREEDY)
    assert one.output_text
    assert one.usage
    two = client.responses.create(input="Two?", instructions=KEEPER, previous_response_id=one.id, **GREEDY)
    assert two.usage
    assert two.usage.input_tokens_details.cached_tokens > one.usage.input_tokens
    shown = client.responses.retrieve(one.id)
    assert shown.output_text == one.output_text
    client.responses.delete(one.id)
    with pytest.raises(openai.NotFoundError) as raised:
        client.responses.retrieve(one.id)
    assert raised.value.code == "response_not_found"


def test_openais_client_follows_a_stream(client: OpenAI) -> None:
    whole = client.responses.create(input="One?", instructions=KEEPER, **GREEDY)
    assert whole.status == "completed"
    with client.responses.stream(input="One?", instructions=KEEPER, **GREEDY) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == whole.output_text
    events = client.responses.create(input="One?", instructions=KEEPER, stream=True, **GREEDY)
    *_, last = events
    assert last.type == "response.completed"
    assert last.response.output_text == text


async def test_openais_asynchronous_client_does_too(toy: RunningServer) -> None:
    async with AsyncOpenAI(base_url=f"{toy.url}/v1", api_key="none", max_retries=0) as client:
        whole = await client.responses.create(input="One?", **GREEDY)
        async with client.responses.stream(input="One?", **GREEDY) as stream:
            deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text


@pytest.mark.real_model
def test_a_real_model_goes_on_from_a_stored_response(real: RunningServer) -> None:
    asked: Any = {"model": "smollm2", "instructions": KEEPER, "max_output_tokens": 12}
    one = _ask(real, "Is there a ship?", **asked)
    two = _ask(real, "And now?", previous_response_id=one["id"], **asked)
    assert two["usage"]["cache_hit"] is True
    assert two["timings"]["prompt_n"] < 40 < two["timings"]["cache_n"]
    turns = [_user("Is there a ship?"), {"role": "assistant", "content": _text(one)}, _user("And now?")]
    again = _ask(real, turns, **asked)
    assert again["usage"]["input_tokens"] == two["usage"]["input_tokens"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "look"}])
def test_a_call_that_must_be_made_is_an_item_of_its_own(toy: RunningServer, choice: Any) -> None:
    fields = {"tools": [TOOL], "tool_choice": choice, "max_output_tokens": 300}
    response = _ask(toy, "Who is there?", **fields)
    assert response["status"] == "completed"
    assert response["tool_choice"] == choice
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    assert calls
    assert {call["name"] for call in calls} == {"look"}
    assert all(isinstance(json.loads(call["arguments"]), dict) for call in calls)
    last = _streamed(toy, input="Who is there?", **fields)[-1]["response"]
    assert [item["arguments"] for item in last["output"] if item["type"] == "function_call"] == [
        call["arguments"] for call in calls
    ]


def test_an_answer_matches_the_schema_that_it_must_have(toy: RunningServer) -> None:
    schema: Json = {"type": "object", "properties": {"miles": {"enum": [3, 5]}}, "required": ["miles"]}
    schema |= {"additionalProperties": False}
    form = {"type": "json_schema", "name": "light", "schema": schema, "strict": True}
    response = _ask(toy, "How far?", text={"format": form}, max_output_tokens=200)
    assert json.loads(_text(response))["miles"] in (3, 5)
    assert response["text"] == {"format": form}
    response = _ask(toy, "How far?", text={"format": {"type": "json_object"}}, max_output_tokens=400)
    assert isinstance(json.loads(_text(response)), dict)
