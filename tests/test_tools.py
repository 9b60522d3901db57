"""Tools in chats: what the model is told of them, what it must call, and how calls come back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from headstart.prompt.calls.default import written_out
from headstart.prompt.prompts import Prompts
from headstart.prompt.template import ChatTemplate
from headstart.prompt.tokenizer import ToyTokenizer
from headstart.service.calling import Calling, reading
from servers import Json, RunningServer, running_server

QUESTION = {"role": "user", "content": "What is out there?"}
SYSTEM = {"role": "system", "content": "You keep the lighthouse and answer in one line. " * 4}


def _tool(name: str, **parameters: Any) -> Json:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


LAMP = _tool("light_lamp", brightness="integer")
HORN = _tool("sound_horn")
TOOLS = [LAMP, HORN]
NAMED = {"type": "function", "function": {"name": "sound_horn"}}


@pytest.fixture(scope="module", params=["tools", "chatml"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A model whose template has tools, and one whose template has none."""
    directory = tmp_path_factory.mktemp("tools") / "cache"
    with running_server(directory, "--model", f"toy=toy:template={request.param}") as running:
        yield running


def _ask(server: RunningServer, *messages: Json, **more: Any) -> Json:
    body = {"model": "toy", "temperature": 0, "max_tokens": 24, **more}
    response = server.post("/v1/chat/completions", messages=list(messages) or [QUESTION], **body)
    assert response.status_code == 200, response.text
    return response.json()


def _refusal(server: RunningServer, **more: Any) -> tuple[int, str, str]:
    body = {"model": "toy", "max_tokens": 1, "messages": [QUESTION], **more}
    response = server.http.post("/v1/chat/completions", content=json.dumps(body))
    error = response.json()["error"]
    return response.status_code, error["param"], error["message"]


# The prompt


def _call(name: str, arguments: str, id_: str = "call_1") -> Json:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_template_without_tools_is_given_them_as_text() -> None:
    template = ChatTemplate("chatml", "", "")
    call = {"function": {"name": "light_lamp", "arguments": {"brightness": 3}}}
    prompt = template.render(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Light!"},
            {"role": "assistant", "content": "", "tool_calls": [call, call]},
            {"role": "tool", "content": "lit"},
            {"role": "tool", "content": "lit again"},
        ],
        [HORN],
    )
    system, user, assistant, results, *_ = prompt.split("<|im_start|>")[1:]
    assert system.startswith("system\nBe brief.\n\n# Tools\n\n")
    assert f"<tools>\n{json.dumps(HORN)}\n</tools>" in system
    assert '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' in system
    written = '<tool_call>\n{"name": "light_lamp", "arguments": {"brightness": 3}}\n</tool_call>'
    assert user == "user\nLight!<|im_end|>\n"
    assert assistant == f"assistant\n{written}\n{written}<|im_end|>\n"
    assert results == (
        "user\n<tool_response>\nlit\n</tool_response>\n"
        "<tool_response>\nlit again\n</tool_response><|im_end|>\n"
    )


def test_tools_come_in_a_system_message_of_their_own_where_there_is_none() -> None:
    first, second = written_out([QUESTION], [HORN])
    assert first["role"] == "system"
    assert first["content"].startswith("# Tools")
    assert second == QUESTION


@pytest.mark.parametrize("template", ["fold", "nosystem"])
def test_tools_are_folded_into_the_user_message_where_the_template_takes_no_system_one(template: str) -> None:
    call = {"function": {"name": "sound_horn", "arguments": {}}}
    turns = [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "Toot"},
    ]
    prompt = ChatTemplate(template, "", "").render(turns, [HORN])
    assert prompt.startswith("<|im_start|>user\n# Tools")
    assert "What is out there?<|im_end|>" in prompt
    assert "<tool_response>\nToot\n</tool_response>" in prompt


# The answer


class Marked(ToyTokenizer):
    """Characters and one token for each of these markers, which is no text."""

    markers = ("[TOOL_CALLS]", "</think>")

    def encode(self, text: str, first: bool = True) -> list[int]:
        if text in self.markers:
            return [1000 + self.markers.index(text)]
        return list(text.encode())

    def piece(self, token: int) -> bytes:
        return b"" if token >= 1000 else bytes([token])

    def written(self, token: int) -> bytes:
        return self.markers[token - 1000].encode() if token >= 1000 else bytes([token])


def _marked() -> Prompts:
    template = (
        "{{ tools }}[TOOL_CALLS] [</think>{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    return Prompts(Marked("toy:"), ChatTemplate(template, "", ""))


def test_markers_that_are_no_text_are_read_all_the_same() -> None:
    how = reading(_marked(), TOOLS, Calling(), list(b"...<think>\n"))
    tokens = [*b"Hm.", 1001, 1000, *b'[{"name": "sound_horn", "arguments": {}}]']
    text = b"".join(map(how.piece, tokens)).decode()
    parser = how.parser()
    parts = [*parser.add(text), *parser.end()]
    assert [part.reasoning for part in parts if part.reasoning] == ["Hm."]
    (first, *_) = [part.call for part in parts if part.call]
    assert first.name == "sound_horn"
    assert len(first.id) == 9


@pytest.mark.parametrize(("tools", "choice"), [((), "auto"), (TOOLS, "none")])
def test_markers_of_calls_are_no_text_where_none_are_read(tools: list[Json], choice: Any) -> None:
    how = reading(_marked(), tools, Calling(choice), list(b"..."))
    assert how.piece(1000) == b""
    text = '[TOOL_CALLS][{"name": "sound_horn", "arguments": {}}]'
    parser = how.parser()
    assert "".join(part.text for part in [*parser.add(text), *parser.end()]) == text


def test_markers_that_are_no_text_are_tokens_in_a_grammar() -> None:
    how = reading(_marked(), TOOLS, Calling("required"), list(b"...<think>\n"))
    assert "calls: <[1000]> " in how.grammar
    assert "<[1001]>" in how.grammar
    assert reading(_marked(), TOOLS, Calling("auto"), []).grammar == ""


# Requests


@pytest.mark.parametrize("choice", [None, "none", "auto"])
def test_tools_may_be_there_to_be_called_or_not(server: RunningServer, choice: str | None) -> None:
    answer = _ask(server, tools=TOOLS, tool_choice=choice)
    assert answer["usage"]["prompt_tokens"] > _ask(server)["usage"]["prompt_tokens"] + 50
    assert answer["usage"]["prompt_tokens"] == _ask(server, tools=TOOLS)["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("param", "body", "word"),
    [
        ("tool_choice", {"tool_choice": "required"}, "no tools"),
        ("tool_choice", {"tool_choice": NAMED}, "no tools"),
        ("tool_choice", {"tools": [LAMP], "tool_choice": NAMED}, "sound_horn"),
        ("tool_choice", {"tools": [LAMP], "tool_choice": "any"}, "required"),
        ("tool_choice", {"tools": [LAMP], "tool_choice": {"type": "function"}}, "function"),
        ("tool_choice", {"tools": [LAMP], "tool_choice": {"type": "function", "function": {"name": 1}}}, ""),
        (
            "tool_choice",
            {"tools": [LAMP], "tool_choice": {"type": "function", "function": {"name": "\ud800"}}},
            "",
        ),
        ("parallel_tool_calls", {"tools": [LAMP], "parallel_tool_calls": "some"}, "boolean"),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "object"),
        ("tools", {"tools": [_tool("f", a="strin")], "tool_choice": "required"}, "strin"),
        (
            "tools",
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}],
                "tool_choice": "required",
            },
            "object",
        ),
    ],
)
def test_what_can_not_be_called_is_refused(server: RunningServer, param: str, body: Json, word: str) -> None:
    status, told, message = _refusal(server, **body)
    assert (status, told.partition(".")[0]) == (400, param), message
    assert word in message


def test_schemas_nested_as_deeply_as_json_goes_are_no_fault_of_the_server(server: RunningServer) -> None:
    for depth in (100, 300, 500, 700, 850, 900, 950, 1000, 3000):
        schema = '{"type": "object", "properties": {"a": ' * depth + "{}" + "}}" * depth
        tool = f'{{"type": "function", "function": {{"name": "f", "parameters": {schema}}}}}'
        for more in ("", ', "tool_choice": "required"'):
            messages = '[{"role": "user", "content": "a"}]'
            body = f'{{"model": "toy", "max_tokens": 1, "messages": {messages}, "tools": [{tool}]{more}}}'
            response = server.http.post("/v1/chat/completions", content=body)
            assert response.status_code in (200, 400), (depth, response.text)


def test_a_cache_of_tools_serves_requests_with_them(server: RunningServer) -> None:
    response = server.post("/v1/cache/toy", cache_name="tooled", messages=[SYSTEM], tools=TOOLS)
    assert response.status_code == 200, response.text
    cold = _ask(server, SYSTEM, QUESTION, tools=TOOLS, cache_prompt=False)
    for more in ({}, {"tools": TOOLS}, {"tool_choice": "none"}):
        warm = _ask(server, use_cache="tooled", **more)
        assert warm["usage"]["cache_hit"] is True
        assert warm["timings"]["prompt_n"] < 60
        assert warm["choices"] == cold["choices"]
    status, param, message = _refusal(
        server, use_cache="tooled", tool_choice={**NAMED, "function": {"name": "x"}}
    )
    assert (status, param) == (400, "tool_choice"), message
