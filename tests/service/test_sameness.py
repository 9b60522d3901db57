"""Differences that aren't any: what a client sends back in its own way is the cache's own content, said once.
A request that names nothing is rendered as it was sent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from conftest import StartServer
from servers import ONE_THREAD, WITHOUT_STORE, Json, RunningServer, eventually, running_server, said

KEEPER = "You keep the lighthouse and tell what you see in one line. " * 9
SYSTEM = {"role": "system", "content": KEEPER}
QUESTION = {"role": "user", "content": "What is out there?"}
NEXT = {"role": "user", "content": "And now?"}


def _tool(name: str) -> Json:
    parameters = {
        "type": "object",
        "properties": {"at": {"type": "string", "description": "when " * 20}},
        "required": ["at"],
    }
    return {"type": "function", "function": {"name": name, "description": "x" * 60, "parameters": parameters}}


def _turned(value: Any) -> Any:
    """The same value with the keys of all objects in the opposite order."""
    if isinstance(value, dict):
        return {key: _turned(item) for key, item in reversed(value.items())}
    return [_turned(item) for item in value] if isinstance(value, list) else value


LAMP, HORN = _tool("light_lamp"), _tool("sound_horn")
ORDERS = {
    "tools in another order": [HORN, LAMP],
    "keys in another order": [_turned(LAMP), _turned(HORN)],
    "both": [_turned(HORN), _turned(LAMP)],
}
orders = pytest.mark.parametrize("tools", ORDERS.values(), ids=ORDERS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A model whose template has tools."""
    directory = tmp_path_factory.mktemp("same") / "cache"
    with running_server(directory, "--model", "toy=toy:template=tools") as running:
        yield running


def _create(server: RunningServer, name: str, **body: Any) -> None:
    response = server.post("/v1/cache/toy", cache_name=name, **body)
    assert response.status_code == 200, response.text


def _ask(server: RunningServer, *messages: Json, **body: Any) -> Json:
    fields = {"model": "toy", "temperature": 0, "max_tokens": 24, "explain_cache": True, **body}
    response = server.post("/v1/chat/completions", messages=list(messages), **fields)
    assert response.status_code == 200, response.text
    return response.json()


def _check_same(answer: Json, plain: Json, name: str) -> None:
    """The answer is that of the request `plain`, which repeats nothing of the named cache."""
    for each in (answer, plain):
        usage, told = each["usage"], each["cache_explanation"]
        assert (usage["cache_hit"], usage["cached_prompts"]) == (True, [name]), usage
        assert told["closest_cache"] == name
        assert told["matched_tokens"] >= told["cache_tokens"] - 1
        assert f"started from the state of '{name}'" in told["reason"]
    assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    assert said(answer) == said(plain)


@orders
def test_tools_written_in_another_order_are_those_of_the_named_cache(
    server: RunningServer, tools: list[Json]
) -> None:
    _create(server, "tooled", messages=[SYSTEM], tools=[LAMP, HORN])
    plain = _ask(server, QUESTION, use_cache="tooled")
    _check_same(_ask(server, QUESTION, use_cache="tooled", tools=tools), plain, "tooled")


@pytest.mark.parametrize("tools", [[LAMP], [LAMP, LAMP], [LAMP, HORN, HORN]], ids=len)
def test_fewer_or_more_tools_than_the_named_caches_are_others(
    server: RunningServer, tools: list[Json]
) -> None:
    _create(server, "tooled", messages=[SYSTEM], tools=[LAMP, HORN])
    usage = _ask(server, QUESTION, use_cache="tooled", tools=tools)["usage"]
    assert (usage["cache_hit"], usage["cache_miss_reason"]) == (False, "prompt_differs")


@orders
def test_tools_written_in_another_order_are_those_of_the_stored_response(
    server: RunningServer, tools: list[Json]
) -> None:
    def respond(text: str, tools: list[Json], **more: Any) -> Json:
        flat = [{"type": "function", **tool["function"]} for tool in tools]
        fields = {"model": "toy", "input": text, "tools": flat, "temperature": 0, "max_output_tokens": 16}
        response = server.post("/v1/responses", **fields, **more)
        assert response.status_code == 200, response.text
        return response.json()

    one = respond("One?", [LAMP, HORN], instructions=KEEPER)
    after = {"previous_response_id": one["id"], "store": False}
    two = respond("Two?", [LAMP, HORN], instructions=KEEPER, **after)
    # White space at the end of the instructions doesn't count either.
    other = respond("Two?", tools, instructions=KEEPER.rstrip(), **after)
    for response in (two, other):
        assert response["usage"]["cached_prompts"] == [one["id"]], response["usage"]
    assert other["usage"]["input_tokens"] == two["usage"]["input_tokens"]
    assert [item.get("content") for item in other["output"]] == [
        item.get("content") for item in two["output"]
    ]
    assert [tool["name"] for tool in other["tools"]] == [tool["function"]["name"] for tool in tools]


@orders
def test_a_request_that_names_nothing_has_its_tools_rendered_as_sent(
    start_server: StartServer, tools: list[Json]
) -> None:
    server = start_server("--model", "toy=toy:template=tools", env=WITHOUT_STORE)
    cold = _ask(server, SYSTEM, QUESTION, tools=tools)
    of_the_cache = _ask(server, SYSTEM, QUESTION, tools=[LAMP, HORN])
    assert said(cold) != said(of_the_cache)
    _create(server, "tooled", messages=[SYSTEM], tools=[LAMP, HORN])
    server.restart()
    answer = _ask(server, SYSTEM, QUESTION, tools=tools)
    assert said(answer) == said(cold)
    # The system text stands before the tools: all of it is read from the cache's file.
    timings, told = answer["timings"], answer["cache_explanation"]
    assert timings["cache_source"] == "file"
    assert len(KEEPER) // 2 < timings["cache_n"] <= told["matched_tokens"] < told["cache_tokens"]
    assert told["closest_cache"] == "tooled"


@pytest.mark.parametrize("cached", [KEEPER.rstrip(), KEEPER.rstrip() + "\n\n"])
@pytest.mark.parametrize("sent", [KEEPER.rstrip(), KEEPER.rstrip() + " \n"])
def test_white_space_at_the_end_of_a_system_prompt_does_not_count(
    server: RunningServer, cached: str, sent: str
) -> None:
    _create(server, "spaced", prompt=cached)
    plain = _ask(server, QUESTION, use_cache="spaced")
    answer = _ask(server, {"role": "system", "content": sent}, QUESTION, use_cache="spaced")
    _check_same(answer, plain, "spaced")


def test_a_system_prompt_that_begins_in_another_way_is_another(server: RunningServer) -> None:
    _create(server, "spaced", prompt=KEEPER)
    plain = _ask(server, QUESTION, use_cache="spaced")
    answer = _ask(server, {"role": "system", "content": " " + KEEPER}, QUESTION, use_cache="spaced")
    assert answer["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + len(KEEPER) // 2


def _call(arguments: Any, **more: Any) -> Json:
    return {
        "id": "call_1",
        "type": "function",
        "function": {"name": "light_lamp", "arguments": arguments},
        **more,
    }


CALL_TEXT = '<tool_call>\n{"name": "light_lamp", "arguments": {"at": "dusk"}}\n</tool_call>'
CALLED = {"content": None, "tool_calls": [_call('{"at":"dusk"}')]}
# The texts of an answer as a cache has it, and the message as a client sends it back.
SENT_BACK: dict[str, tuple[str, Json]] = {
    "white space": ("A ship. \n", {"content": "A ship."}),
    "white space at the beginning": ("\nA ship.", {"content": "A ship."}),
    "reasoning left out": ("<think>\nHm.\n</think>\n\nA ship.", {"content": "A ship."}),
    "reasoning apart": (
        "<think>\nHm.\n</think>\n\nA ship.",
        {"content": "A ship.", "reasoning_content": "Hm."},
    ),
    "a call": (CALL_TEXT, CALLED),
    "a call after a text": (f"I will.\n{CALL_TEXT}", {**CALLED, "content": "I will."}),
    "a call after reasoning": (f"<think>\nHm.\n</think>\n\n{CALL_TEXT}", CALLED),
    "two calls": (
        f"{CALL_TEXT}\n{CALL_TEXT.replace('dusk', 'dawn')}",
        {"content": "", "tool_calls": [_call('{"at": "dusk"}'), _call('{"at": "dawn"}', id="call_2")]},
    ),
}
OTHERS: dict[str, tuple[str, Json]] = {
    "another text": ("A ship.", {"content": "A boat."}),
    "other reasoning": (
        "<think>\nHm.\n</think>\n\nA ship.",
        {"content": "A ship.", "reasoning_content": "Aha."},
    ),
    "other arguments": (CALL_TEXT, {"content": None, "tool_calls": [_call('{"at": "dawn"}')]}),
    "a call less": (f"{CALL_TEXT}\n{CALL_TEXT}", CALLED),
    "a text more": (CALL_TEXT, {**CALLED, "content": "I will."}),
}


def _sent_back(server: RunningServer, text: str, message: Json) -> tuple[Json, Json]:
    """The answers to the next question, alone and after the history with the message sent back."""
    history = [SYSTEM, QUESTION]
    _create(server, "talk", messages=[*history, {"role": "assistant", "content": text}], tools=[LAMP])
    plain = _ask(server, NEXT, use_cache="talk")
    return plain, _ask(server, *history, {"role": "assistant", **message}, NEXT, use_cache="talk")


@pytest.mark.parametrize(("text", "message"), SENT_BACK.values(), ids=SENT_BACK)
def test_an_answer_that_is_sent_back_in_another_form_is_said_once(
    server: RunningServer, text: str, message: Json
) -> None:
    plain, answer = _sent_back(server, text, message)
    _check_same(answer, plain, "talk")


@pytest.mark.parametrize(("text", "message"), OTHERS.values(), ids=OTHERS)
def test_another_answer_is_another(server: RunningServer, text: str, message: Json) -> None:
    plain, answer = _sent_back(server, text, message)
    assert answer["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + len("What is out there?")


def test_a_call_in_a_kept_message_is_the_same_only_with_its_id(server: RunningServer) -> None:
    history = [SYSTEM, QUESTION]
    kept = {"role": "assistant", "content": "", "tool_calls": [_call({"at": "dusk"})]}
    _create(server, "talk", messages=[*history, kept], tools=[LAMP])
    plain = _ask(server, NEXT, use_cache="talk")
    for call_id, is_same in (("call_1", True), ("call_2", False)):
        sent = {**CALLED, "role": "assistant", "tool_calls": [_call('{"at": "dusk"}', id=call_id)]}
        answer = _ask(server, *history, sent, NEXT, use_cache="talk")
        assert (answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]) == is_same


def _check_loop(server: RunningServer, model: str, **body: Any) -> None:
    """A call is saved as the model wrote it, and sent back as OpenAI's clients do."""
    body = {"model": model, "tools": [LAMP], "max_tokens": 60, **body}
    first = _ask(server, SYSTEM, QUESTION, save_as="loop", tool_choice="required", **body)
    message = first["choices"][0]["message"]
    assert (message["content"], len(message["tool_calls"])) == (None, 1), first
    eventually(lambda: server.http.get(f"/v1/cache/{model}/loop").status_code == 200)
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "It is lit."}
    plain = _ask(server, result, use_cache="loop", **body)
    answer = _ask(server, SYSTEM, QUESTION, message, result, use_cache="loop", **body)
    _check_same(answer, plain, "loop")
    # Without the name it is rendered as sent, from the state of what both begin with.
    unnamed = _ask(server, SYSTEM, QUESTION, message, result, **body)
    cold = _ask(server, SYSTEM, QUESTION, message, result, cache_prompt=False, **body)
    assert said(unnamed) == said(cold)
    assert unnamed["usage"]["prompt_tokens"] == cold["usage"]["prompt_tokens"]
    server.restart()
    restarted = _ask(server, SYSTEM, QUESTION, message, result, **body)
    assert restarted["timings"]["cache_source"] == "file"
    assert restarted["timings"]["prompt_n"] < restarted["timings"]["cache_n"]
    assert said(restarted) == said(cold)


def test_a_tool_loop_goes_on_from_the_saved_call(start_server: StartServer) -> None:
    _check_loop(start_server("--model", "toy=toy:template=tools", env=WITHOUT_STORE), "toy")


@pytest.mark.real_model
def test_a_real_models_tool_loop_goes_on_from_the_saved_call(start_server: StartServer) -> None:
    _check_loop(start_server(*ONE_THREAD, env=WITHOUT_STORE), "smollm2")


@pytest.mark.real_model
def test_a_real_models_tools_in_another_order_are_those_of_the_named_cache(real: RunningServer) -> None:
    body = {"cache_name": "ordered", "messages": [SYSTEM], "tools": [LAMP, HORN]}
    assert real.post("/v1/cache/smollm2", **body).status_code == 200
    plain = _ask(real, QUESTION, use_cache="ordered", model="smollm2")
    system = {"role": "system", "content": KEEPER.rstrip() + "\n"}
    answer = _ask(real, system, QUESTION, use_cache="ordered", tools=ORDERS["both"], model="smollm2")
    _check_same(answer, plain, "ordered")
