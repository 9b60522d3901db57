"""Caches of messages and tools: what a chat begins with, be it more than a system message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import StartServer
from headstart.prompt.template import ChatTemplate
from servers import Json, RunningServer, running_server, said

EXAMPLES = [
    {"role": "system", "content": "You keep the lighthouse and answer in one line. " * 8},
    {"role": "user", "content": "What is a buoy? " * 8},
    {"role": "assistant", "content": "A mark that floats. " * 8},
]


def _tool(name: str) -> Json:
    parameters = {"type": "object", "properties": {"at": {"type": "string", "description": "when " * 20}}}
    return {"type": "function", "function": {"name": name, "description": "x" * 60, "parameters": parameters}}


LAMP, HORN = _tool("light_lamp"), _tool("sound_horn")
QUESTION = {"role": "user", "content": "What is out there?"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A model whose template has tools."""
    directory = tmp_path_factory.mktemp("tools") / "cache"
    with running_server(directory, "--model", "toy=toy:template=tools") as running:
        yield running


def _create(server: RunningServer, name: str, **body: Any) -> Json:
    response = server.post("/v1/cache/toy", cache_name=name, **body)
    assert response.status_code == 200, response.text
    return response.json()


def _ask(server: RunningServer, *messages: Json, **body: Any) -> Json:
    fields = {"model": "toy", "temperature": 0, "max_tokens": 24, **body}
    response = server.post("/v1/chat/completions", messages=list(messages or [QUESTION]), **fields)
    assert response.status_code == 200, response.text
    return response.json()


def _error(server: RunningServer, path: str, **body: Any) -> tuple[int, str, str, str]:
    response = server.post(path, **body)
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"], error["message"]


def _check_hit(answer: Json, *names: str) -> None:
    usage, timings = answer["usage"], answer["timings"]
    assert usage["cache_hit"] is True
    assert usage["cached_prompts"] == list(names)
    assert timings["cache_n"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert timings["prompt_n"] == usage["prompt_tokens"] - timings["cache_n"] <= 40 < timings["cache_n"]


@pytest.mark.parametrize("template", ["chatml", "fold", "nosystem", "tools"])
def test_a_chat_with_cached_examples_says_what_it_says_with_them_in_full_also_after_a_restart(
    start_server: StartServer, template: str
) -> None:
    server = start_server("--model", f"toy=toy:template={template}")
    cold = _ask(server, *EXAMPLES, QUESTION, cache_prompt=False)
    created = _create(server, "examples", messages=EXAMPLES)
    assert list(created["forms"]) == ["chat"]
    warm = _ask(server, use_cache="examples")
    server.restart()
    restarted = _ask(server, use_cache="examples")
    assert restarted["timings"]["cache_source"] == "file"
    for answer in (warm, restarted):
        _check_hit(answer, "examples")
        assert said(answer) == said(cold)
        assert answer["usage"]["prompt_tokens"] == cold["usage"]["prompt_tokens"]


def test_messages_of_the_request_that_the_cache_begins_with_are_not_repeated(server: RunningServer) -> None:
    _create(server, "examples", messages=EXAMPLES)
    plain = _ask(server, use_cache="examples")
    for repeated in (EXAMPLES, EXAMPLES[:1]):
        answer = _ask(server, *repeated, QUESTION, use_cache="examples")
        _check_hit(answer, "examples")
        assert said(answer) == said(plain)
        assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


def test_a_question_that_is_asked_as_in_the_examples_is_asked_all_the_same(server: RunningServer) -> None:
    _create(server, "examples", messages=EXAMPLES)
    asked = _ask(server, EXAMPLES[1], use_cache="examples")
    whole = _ask(server, *EXAMPLES, EXAMPLES[1], cache_prompt=False)
    assert said(asked) == said(whole)
    assert asked["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]


def test_a_cache_shows_its_messages_and_tools(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:template=tools")
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a buoy?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    _create(server, "shown", messages=messages, tools=[LAMP])
    for _ in range(2):
        shown = server.http.get("/v1/cache/toy/shown").json()
        assert shown["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is a buoy?"},
        ]
        assert shown["tools"] == [LAMP]
        assert "prompt" not in shown
        server.restart()


def test_the_same_messages_under_the_same_name_compute_nothing(server: RunningServer) -> None:
    _create(server, "again", messages=EXAMPLES, tools=[LAMP])
    again = _create(server, "again", messages=EXAMPLES, tools=[LAMP])
    assert (again["object"], again["build_ms"]) == ("cache.updated", 0)
    other = _create(server, "again", messages=EXAMPLES, tools=[HORN])
    assert other["build_ms"] > 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": EXAMPLES}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": EXAMPLES, "for": ["completion"]}, "for"),
        ({"messages": EXAMPLES, "for": ["chat", "completion"]}, "for"),
        ({"prompt": "a", "tools": [LAMP]}, "tools"),
        ({"tools": [LAMP]}, "prompt"),
        ({"messages": EXAMPLES, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": EXAMPLES, "tools": [{"type": "retrieval"}]}, "tools"),
        ({"messages": EXAMPLES, "tools": [_tool("")]}, "tools"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_a_cache_of_neither_or_both_or_of_what_it_can_not_be_for_is_refused(
    server: RunningServer, body: Json, param: str
) -> None:
    status, code, said_of, _ = _error(server, "/v1/cache/toy", cache_name="bad", **body)
    assert (status, code, said_of) == (400, "invalid_value", param)
    assert server.http.get("/v1/cache/toy/bad").status_code == 404


@pytest.mark.parametrize("tool", [_tool("\ud800"), _tool("a") | {"x": float("nan")}], ids=["half", "NaN"])
def test_what_json_does_not_have_is_refused_within_a_tool(server: RunningServer, tool: Json) -> None:
    body = json.dumps({"cache_name": "bad", "messages": EXAMPLES, "tools": [tool]})
    response = server.http.post("/v1/cache/toy", content=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


def test_messages_for_chats_only_are_built_and_completions_say_that_they_can_not_use_them(
    server: RunningServer,
) -> None:
    created = _create(server, "chats", messages=EXAMPLES, **{"for": ["chat"]})
    assert list(created["forms"]) == ["chat"]
    body = {"model": "toy", "prompt": "a", "use_cache": "chats"}
    status, _, param, message = _error(server, "/v1/completions", **body)
    assert (status, param) == (400, "use_cache")
    assert "'chats' holds chat messages" in message


def test_tools_are_written_into_the_prompt(server: RunningServer) -> None:
    without = _ask(server)
    with_tools = _ask(server, tools=[LAMP])
    assert with_tools["usage"]["prompt_tokens"] > without["usage"]["prompt_tokens"] + 200
    assert said(with_tools) != said(without)


@pytest.mark.parametrize("asked", [[LAMP, HORN], None, []], ids=["the same", "none", "an empty list"])
def test_a_request_with_the_tools_of_the_cache_or_none_hits(
    server: RunningServer, asked: list[Json] | None
) -> None:
    _create(server, "tooled", messages=EXAMPLES, tools=[LAMP, HORN])
    cold = _ask(server, *EXAMPLES, QUESTION, tools=[LAMP, HORN], cache_prompt=False)
    warm = _ask(server, use_cache="tooled", tools=asked)
    _check_hit(warm, "tooled")
    assert said(warm) == said(cold)
    assert warm["usage"]["prompt_tokens"] == cold["usage"]["prompt_tokens"]


def test_tools_written_in_another_order_of_their_keys_are_the_same(server: RunningServer) -> None:
    _create(server, "ordered", messages=EXAMPLES, tools=[LAMP])
    turned = {"function": dict(reversed(LAMP["function"].items())), "type": "function"}
    _check_hit(_ask(server, use_cache="ordered", tools=[turned]), "ordered")


def test_a_request_with_other_tools_gets_those_and_says_that_the_cache_is_of_another_prompt(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "toy=toy:template=tools")
    _create(server, "tooled", messages=EXAMPLES, tools=[LAMP])
    cold = _ask(server, *EXAMPLES, QUESTION, tools=[HORN], cache_prompt=False)
    server.restart()
    answer = _ask(server, use_cache="tooled", tools=[HORN])
    assert answer["usage"]["cache_hit"] is False
    assert answer["usage"]["cached_prompts"] == []
    assert answer["usage"]["cache_miss_reason"] == "prompt_differs"
    assert said(answer) == said(cold)
    # The system text comes before the tools in this template: that much is the same prompt.
    assert 300 < answer["timings"]["cache_n"] < 450
    assert answer["timings"]["cache_n"] % 64 == 0
    assert answer["timings"]["cache_source"] == "file"
    _check_hit(_ask(server, use_cache="tooled"), "tooled")


def test_the_opening_of_a_chat_with_tools_is_reused_without_a_cache_too(server: RunningServer) -> None:
    system = {"role": "system", "content": "You sail a ship that nobody else has seen. " * 8}
    first = _ask(server, system, QUESTION, tools=[LAMP])
    second = _ask(server, system, {"role": "user", "content": "And now?"}, tools=[LAMP])
    assert first["timings"]["cache_n"] < 20
    assert second["timings"]["prompt_n"] <= 40
    other = _ask(server, system, QUESTION, tools=[HORN])
    assert other["timings"]["prompt_n"] > 200


def test_a_cache_with_tools_is_made_again_once_the_template_has_none(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:template=tools")
    _create(server, "tooled", messages=EXAMPLES, tools=[LAMP])
    server.stop()
    server = start_server("--model", "toy=toy:")
    missed = _ask(server, use_cache="tooled")
    assert missed["usage"]["cache_hit"] is False
    again = server.post("/v1/cache/toy", cache_name="tooled", messages=EXAMPLES, tools=[LAMP])
    assert again.status_code == 200
    _check_hit(_ask(server, use_cache="tooled"), "tooled")


def test_earlier_calls_and_their_results_are_written_as_the_template_writes_them(
    server: RunningServer,
) -> None:
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "light_lamp", "arguments": '{"at": "dusk and long after it"}'},
    }
    turns: list[dict[str, Any]] = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "The lamp is lit."},
    ]
    answer = _ask(server, *turns, tools=[LAMP])
    assert answer["usage"]["prompt_tokens"] > _ask(server, tools=[LAMP])["usage"]["prompt_tokens"] + 40
    _create(server, "called", messages=turns, tools=[LAMP])
    _check_hit(_ask(server, use_cache="called"), "called")


def test_a_template_mentions_tools_only_where_it_reads_them() -> None:
    assert ChatTemplate("{% if tools %}{{ tools[0] }}{% endif %}", "", "").has_tools
    assert not ChatTemplate("{# tools #}tools {{ 'tools' }}", "", "").has_tools


HERMES = """{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% endif %}
{{- 'You may call these functions:\\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% elif messages[0]['role'] == 'system' %}
{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}{% if message['role'] != 'system' %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{{- '<|im_start|>assistant\\n' }}"""


@pytest.mark.real_model
def test_a_real_model_says_the_same_with_cached_examples_and_tools(
    start_server: StartServer, tmp_path: Path
) -> None:
    template = tmp_path / "hermes.jinja"
    template.write_text(HERMES)
    server = start_server(env={"HEADSTART_TEMPLATES": json.dumps({"smollm2": str(template)})})
    body = {"model": "smollm2", "max_tokens": 24}
    response = server.post("/v1/cache/smollm2", cache_name="tooled", messages=EXAMPLES, tools=[LAMP, HORN])
    assert response.status_code == 200, response.text
    cold = _ask(server, *EXAMPLES, QUESTION, tools=[LAMP, HORN], cache_prompt=False, **body)
    warm = _ask(server, use_cache="tooled", **body)
    server.restart()
    restarted = _ask(server, use_cache="tooled", tools=[LAMP, HORN], **body)
    for answer in (warm, restarted):
        _check_hit(answer, "tooled")
        assert said(answer) == said(cold)
