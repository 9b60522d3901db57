"""Tools in chats: what the model is told of them, what it must call, and how calls come back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai import OpenAI

from conftest import StartServer
from headstart.model_files import embedded_model
from headstart.prompt.load import load_prompts
from headstart.prompt.prompts import Prompts
from headstart.prompt.template import ChatTemplate
from headstart.prompt.tool_calls.plain_text import written_out
from headstart.prompt.toy_tokenizer import ToyTokenizer
from headstart.prompt.vocabulary import Vocabulary
from headstart.service.generation.tool_calls import reading
from headstart.service.interface.options import Calling
from servers import Json, RunningServer, events, running_server

QUESTION = {"role": "user", "content": "What is out there?"}
SYSTEM = {"role": "system", "content": "You keep the lighthouse and answer in one line. " * 4}


def _tool(name: str, **parameters: Any) -> Json:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


LAMP = _tool("light_lamp", brightness="integer")
HORN = _tool("sound_horn")
TOOLS = [LAMP, HORN]
# Enough for anything the toy model has to say.
ROOM = 2000
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
    turns: list[Json] = [
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
    n_vocab = 1002

    def encode(self, text: str, first: bool = True, *, parse_special: bool = True) -> list[int]:
        if text in self.markers:
            return [1000 + self.markers.index(text)]
        return list(text.encode())

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def written(self, token: int) -> bytes:
        return self.markers[token - 1000].encode() if token >= 1000 else self.piece(token)


def _marked() -> Vocabulary:
    template = (
        "{{ tools }}[TOOL_CALLS] [</think>{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    return Vocabulary(Prompts(Marked("toy:"), ChatTemplate(template, "", "")).facts())


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


@pytest.mark.slow
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


# Calls that are asked for


def _calls(message: Json) -> list[tuple[str, Json]]:
    functions = [call["function"] for call in message["tool_calls"]]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


def _check_calls(choice: Json) -> list[tuple[str, Json]]:
    """Those of an answer that is made of calls, each valid by its schema and with an id of its own."""
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] is None
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == len(ids)
    assert all(id_.startswith("call_") and len(id_) > 20 for id_ in ids)
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    calls = _calls(message)
    for name, arguments in calls:
        jsonschema.validate(arguments, schemas[name])
    return calls


@pytest.mark.parametrize("seed", range(4))
def test_a_required_call_is_made(server: RunningServer, seed: int) -> None:
    body = {"tools": TOOLS, "tool_choice": "required", "temperature": 1, "seed": seed, "max_tokens": ROOM}
    assert _check_calls(_ask(server, **body)["choices"][0])
    assert len(_check_calls(_ask(server, **body, parallel_tool_calls=False)["choices"][0])) == 1


@pytest.mark.parametrize("seed", range(4))
def test_the_named_function_is_called_once(server: RunningServer, seed: int) -> None:
    for tool in (LAMP, HORN):
        name = tool["function"]["name"]
        choice = {"type": "function", "function": {"name": name}}
        body = {"tools": TOOLS, "tool_choice": choice, "temperature": 1, "seed": seed, "max_tokens": ROOM}
        ((called, _),) = _check_calls(_ask(server, **body)["choices"][0])
        assert called == name


def _streamed(server: RunningServer, **body: Any) -> tuple[list[Json], Json]:
    """The deltas, and the choice that they are together but for its ids."""
    body = {"model": "toy", "messages": [QUESTION], "stream": True, **body}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        choices = [event["choices"][0] for event in events(response)]
    deltas = [choice["delta"] for choice in choices]
    calls: list[Json] = []
    for delta in deltas:
        for told in delta.get("tool_calls", []):
            if told["index"] == len(calls):
                assert told["type"] == "function"
                calls.append({"id": told["id"], "type": "function", "function": dict(told["function"])})
            else:
                assert told.keys() == {"index", "function"}
                assert told["function"].keys() == {"arguments"}
                calls[told["index"]]["function"]["arguments"] += told["function"]["arguments"]
    content = "".join(delta.get("content") or "" for delta in deltas)
    message = {"content": content or None, "tool_calls": calls}
    return deltas, {"message": message, "finish_reason": choices[-1]["finish_reason"]}


def test_a_streamed_call_is_that_of_the_whole_answer_told_as_it_is_written(server: RunningServer) -> None:
    body = {"tools": TOOLS, "tool_choice": "required", "temperature": 0, "seed": 1, "max_tokens": ROOM}
    whole = _ask(server, **body)["choices"][0]
    deltas, choice = _streamed(server, **body)
    assert _check_calls(choice) == _check_calls(whole)
    fragments = sum(len(delta.get("tool_calls", [])) for delta in deltas)
    assert fragments > 2 * len(choice["message"]["tool_calls"])


def test_a_call_that_is_cut_off_keeps_what_there_is(server: RunningServer) -> None:
    body = {"tools": [LAMP], "tool_choice": "required", "temperature": 0, "max_tokens": ROOM}
    n_tokens = _ask(server, **body)["usage"]["completion_tokens"]
    for fewer in (14, 40):
        choice = _ask(server, **{**body, "max_tokens": n_tokens - fewer})["choices"][0]
        assert choice["finish_reason"] == "length"
        message = choice["message"]
        text = (message["content"] or "") + str(message.get("tool_calls", ""))
        assert "light_lamp" in text or "<tool_call>" in text


def test_each_call_has_an_id_of_its_own(server: RunningServer) -> None:
    body = {"tools": TOOLS, "tool_choice": "required", "seed": 1, "max_tokens": ROOM}
    messages = [_ask(server, **body)["choices"][0]["message"] for _ in range(2)]
    ids = [call["id"] for message in messages for call in message["tool_calls"]]
    assert len(ids) > 1
    assert len(set(ids)) == len(ids)


def test_calls_are_text_where_none_are_wanted(server: RunningServer) -> None:
    """What would be a call is made by a grammar of the request's own."""
    text = '<tool_call>\n{"name": "sound_horn", "arguments": {}}\n</tool_call>'
    body = {"tools": TOOLS, "grammar": f"start: {json.dumps(text)}", "max_tokens": ROOM}
    message = _ask(server, **body, tool_choice="none")["choices"][0]["message"]
    assert message["content"] == text
    assert "tool_calls" not in message
    assert _calls(_ask(server, **body)["choices"][0]["message"]) == [("sound_horn", {})]
    named = _ask(server, **{**body, "grammar": f"start: {json.dumps(text.replace('sound_horn', 'swim'))}"})
    assert named["choices"][0]["message"]["content"] == text.replace("sound_horn", "swim")


# The real model


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place now.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
        },
    },
}
PARIS: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.mark.real_model
@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "get_weather"}}],
    ids=["required", "named"],
)
def test_the_default_model_calls_a_function_and_is_told_its_result(real: RunningServer, choice: Any) -> None:
    with OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as client:
        options: Any = {"model": "smollm2", "tools": [WEATHER, HORN], "temperature": 0, "max_tokens": 200}
        first = client.chat.completions.create(messages=PARIS, tool_choice=choice, **options)
        assert first.choices[0].finish_reason == "tool_calls"
        message = first.choices[0].message
        assert message.tool_calls
        call: Any = message.tool_calls[0]
        assert call.function.name == "get_weather"
        arguments = json.loads(call.function.arguments)
        jsonschema.validate(arguments, WEATHER["function"]["parameters"])  # type: ignore[index]
        assert arguments["city"] == "Paris"
        result = {"role": "tool", "tool_call_id": call.id, "content": "17 degrees, rain"}
        turns = [*PARIS, message.model_dump(exclude_none=True), result]
        second = client.chat.completions.create(messages=turns, tool_choice="none", **options)
        assert second.choices[0].message.content
        assert not second.choices[0].message.tool_calls
        # The first prompt is what the second one begins with.
        assert first.usage
        assert second.usage
        assert second.usage.prompt_tokens_details
        assert (second.usage.prompt_tokens_details.cached_tokens or 0) > first.usage.prompt_tokens - 70


@pytest.mark.real_model
def test_the_default_model_calls_the_same_from_a_cache(real: RunningServer) -> None:
    opening = [{"role": "system", "content": "You answer questions about the weather."}]
    response = real.post("/v1/cache/smollm2", cache_name="weather", messages=opening, tools=[WEATHER])
    assert response.status_code == 200, response.text
    body = {"model": "smollm2", "tool_choice": "required", "max_tokens": 200}
    cold = _ask(real, *opening, *PARIS, tools=[WEATHER], cache_prompt=False, **body)
    warm = _ask(real, *PARIS, use_cache="weather", **body)
    assert warm["usage"]["cache_hit"] is True
    assert _calls(warm["choices"][0]["message"]) == _calls(cold["choices"][0]["message"])


@pytest.mark.real_model
def test_a_token_of_its_own_begins_calls_where_the_model_has_one(
    start_server: StartServer, tmp_path: Path
) -> None:
    """A copy of the default model in which a control token has another name of the same length."""
    path = tmp_path / "marked.gguf"
    path.write_bytes(Path(embedded_model()).read_bytes().replace(b"<repo_name>", b"<tool_call>", 1))
    prompts = load_prompts(str(path), None)
    token = prompts.markers["<tool_call>"]
    assert prompts.tokenizer.piece(token) == b""
    server = start_server("--model", f"marked={path}")
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        body = {"model": "marked", "tools": [WEATHER], "tool_choice": choice, "max_tokens": 200}
        message = _ask(server, *PARIS, **body)["choices"][0]["message"]
        assert message["content"] is None
        name, arguments = _calls(message)[0]
        assert name == "get_weather"
        assert arguments.keys() == {"city", "unit"}
