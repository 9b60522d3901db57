"""Answers that match what `response_format` asks for, whatever the model would rather say."""

from __future__ import annotations

import json
import re
import threading
from contextlib import suppress
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headstart.errors import BadRequest
from headstart.service.generation.grammars import written_grammar
from servers import Json, RunningServer, events, eventually, said

PERSON: Json = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
# Enough for anything the toy model has to say.
ROOM = 2000


def of_schema(schema: Json, **more: Any) -> Json:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


def refused(response: httpx.Response, param: str) -> str:
    """The message of a 400 for this parameter."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    return str(error["message"])


def asked(server: RunningServer, **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "Hello"}]
    return server.post(
        "/v1/chat/completions", **{"model": "toy", "messages": messages, "max_tokens": ROOM, **body}
    )


@pytest.mark.parametrize("seed", range(5))
def test_json_object_is_an_object(toy: RunningServer, seed: int) -> None:
    form = {"type": "json_object"}
    body = toy.chat("Hello", response_format=form, temperature=1, seed=seed, max_tokens=ROOM)
    assert isinstance(json.loads(said(body)), dict)
    assert body["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(
    "schema",
    [
        PERSON,
        {"enum": ["a", 1, None, {"b": [True]}]},
        {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
        {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[a-c]{2,5}$"}]},
        {"type": "string", "format": "date"},
        {
            "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
            "$ref": "#/$defs/node",
        },
    ],
    ids=["object", "enum", "array", "any of", "date", "recursive"],
)
def test_an_answer_is_valid_by_its_schema(toy: RunningServer, schema: Json, temperature: float) -> None:
    form = of_schema(schema, strict=True)
    body = toy.chat("Hello", response_format=form, temperature=temperature, seed=3, max_tokens=ROOM)
    jsonschema.validate(json.loads(said(body)), schema)
    assert body["choices"][0]["finish_reason"] == "stop"


SCALARS = st.sampled_from(
    [
        {"type": "string", "maxLength": 5},
        {"type": "integer"},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["é", "\n"]},
    ]
)
SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 3}, inner),
        st.builds(
            lambda properties, required: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties) if required else [],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "b c", 'd"', "é"]), inner, min_size=1),
            st.booleans(),
        ),
        st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=SCHEMAS, seed=st.integers(0, 99))
@pytest.mark.slow
def test_whatever_the_schema_the_answer_is_valid(toy: RunningServer, schema: Json, seed: int) -> None:
    body = toy.chat("Hello", response_format=of_schema(schema), temperature=1, seed=seed, max_tokens=ROOM)
    jsonschema.validate(json.loads(said(body)), schema)


def test_a_regular_expression_is_matched_by_the_whole_answer(toy: RunningServer) -> None:
    for seed in range(5):
        form = {"type": "regex", "regex": "[A-Z][a-z]{3,8} (north|south) [0-9]{2}"}
        text = said(toy.chat("Hello", response_format=form, temperature=1, seed=seed, max_tokens=ROOM))
        assert re.fullmatch(form["regex"], text)


@pytest.mark.parametrize(
    "asked_by",
    [
        {"response_format": {"type": "lark", "lark": 'start: ("ab" | "cd")+ "."'}},
        {"grammar": 'start: ("ab" | "cd")+ "."'},
        {"grammar": 'root ::= ("ab" | "cd")+ "."'},
        {"structured_outputs": {"grammar": 'start: ("ab" | "cd")+ "."'}},
        {"structured_outputs": {"regex": r"(ab|cd)+\."}},
    ],
    ids=["lark", "grammar", "GBNF", "vLLM's grammar", "vLLM's regex"],
)
def test_a_grammar_is_followed(toy: RunningServer, asked_by: Json) -> None:
    text = said(toy.chat("Hello", temperature=1, seed=1, max_tokens=ROOM, **asked_by))
    assert re.fullmatch(r"(ab|cd)+\.", text)


def test_a_choice_is_one_of_its_texts(toy: RunningServer) -> None:
    choices = ["yes", 'a "quoted" one', "zwölf"]
    found = {
        said(toy.chat("Hello", structured_outputs={"choice": choices}, temperature=1, seed=seed))
        for seed in range(20)
    }
    assert found <= set(choices)
    assert len(found) > 1


def test_text_completions_take_it_too(toy: RunningServer) -> None:
    response = toy.post(
        "/v1/completions", model="toy", prompt="Hello", max_tokens=ROOM, response_format=of_schema(PERSON)
    )
    jsonschema.validate(json.loads(said(response.json())), PERSON)


def test_a_stream_has_the_same_answer(toy: RunningServer) -> None:
    body = {
        "model": "toy",
        "messages": [{"role": "user", "content": "Hello"}],
        "response_format": of_schema(PERSON),
        "temperature": 0,
        "max_tokens": ROOM,
    }
    whole = said(toy.post("/v1/chat/completions", **body).json())
    with toy.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        chunks = [chunk["choices"][0] for chunk in events(response)]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == whole
    assert chunks[-1]["finish_reason"] == "stop"


def test_a_cache_does_not_change_the_answer(toy: RunningServer) -> None:
    toy.create("form", "You fill in forms about people. " * 8)
    form = of_schema(PERSON)
    hit = toy.chat("Hello", use_cache="form", response_format=form, max_tokens=ROOM)
    cold = toy.chat("Hello", use_cache="form", response_format=form, max_tokens=ROOM, cache_prompt=False)
    assert hit["usage"]["cache_hit"]
    assert not cold["usage"]["cache_hit"]
    assert said(hit) == said(cold)
    jsonschema.validate(json.loads(said(hit)), PERSON)


def test_an_answer_that_is_cut_says_so(toy: RunningServer) -> None:
    body = toy.chat("Hello", response_format={"type": "regex", "regex": "[ab]{50}"}, max_tokens=10)
    assert body["choices"][0]["finish_reason"] == "length"
    assert re.fullmatch("[ab]{10}", said(body))


def test_an_answer_that_is_complete_with_its_last_token_is_not_cut(toy: RunningServer) -> None:
    body = toy.chat("Hello", response_format={"type": "regex", "regex": "[ab]{10}"}, max_tokens=10)
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 10


def test_a_stop_string_ends_the_answer_before_its_grammar_does(toy: RunningServer) -> None:
    form = {"type": "regex", "regex": "[ab]{20}x[ab]{20}"}
    body = toy.chat("Hello", response_format=form, stop="x", max_tokens=ROOM)
    assert re.fullmatch("[ab]{20}", said(body))
    assert body["choices"][0]["finish_reason"] == "stop"


def test_text_asks_for_nothing(toy: RunningServer) -> None:
    plain = said(toy.chat("Hello"))
    assert said(toy.chat("Hello", response_format={"type": "text"})) == plain
    assert said(toy.chat("Hello", response_format=None)) == plain


def test_answers_that_run_together_follow_each_its_own_form(start_server: Any) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=2,eos=0")
    forms = {"ab": "[ab]{60}", "cd": "[cd]{60}", "plain": None}
    texts: dict[str, str] = {}

    def ask(name: str) -> None:
        form = {"type": "regex", "regex": forms[name]} if forms[name] else {"type": "text"}
        texts[name] = said(server.chat("Hello", response_format=form, max_tokens=60))

    threads = [threading.Thread(target=ask, args=(name,)) for name in forms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert re.fullmatch("[ab]{60}", texts["ab"])
    assert re.fullmatch("[cd]{60}", texts["cd"])
    assert texts["plain"] == said(server.chat("Hello", max_tokens=60))


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "wat"}, "wat"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"$ref": "#/nowhere"}, "/nowhere"),
        ({"$ref": "http://127.0.0.1/schema.json"}, "127.0.0.1"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
        ({"$ref": "#"}, "nothing can match"),
        ({"type": "string", "format": "nonsense"}, "nonsense"),
        ({"enum": ["\ud800"]}, "no JSON"),
        ({"x-guidance": {"lenient": True}, "if": {}}, "if"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_schema_that_cannot_be_enforced_is_refused_with_the_reason(
    toy: RunningServer, schema: Json, why: str, strict: bool
) -> None:
    content = json.dumps(
        {
            "model": "toy",
            "messages": [{"role": "user", "content": "x"}],
            "response_format": of_schema(schema, strict=strict),
        }
    )
    response = toy.http.post("/v1/chat/completions", content=content)
    assert why in refused(response, "response_format")


@pytest.mark.parametrize(
    ("body", "param", "why"),
    [
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format", "unclosed group"),
        ({"response_format": {"type": "lark", "lark": "start: nowhere"}}, "response_format", "nowhere"),
        ({"grammar": "no grammar"}, "grammar", "Expected"),
        ({"grammar": 'root ::= "a'}, "grammar", "GBNF"),
        ({"grammar": "root ::= nowhere"}, "grammar", "'nowhere' not found"),
        ({"grammar": "start: <no_such_token>"}, None, "no_such_token"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.schema",
            "required",
        ),
        ({"grammar": 'start: "a"', "response_format": {"type": "json_object"}}, "grammar", "one form"),
        ({"guided_json": {}}, "guided_json", "not supported"),
    ],
)
def test_what_is_no_form_is_refused_with_the_reason(
    toy: RunningServer, body: Json, param: str, why: str
) -> None:
    assert why in refused(asked(toy, **body), param)


BOMBS = {
    "intersections": "start: T\nT: " + " & ".join(f"/(a|b)*a(a|b){{{i}}}/" for i in range(10, 40)),
    "doubling": "start: T0\n" + "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(2000)) + 'T2000: "x"',
    "a long chain": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + "r4000: r0",
    "deep nesting": "start: " + "(" * 9000 + '"a"' + ")" * 9000,
    "too many states": "start: /((a{1000}){1000}){1000}/",
}


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_hostile_grammar_harms_nothing_but_its_request(toy: RunningServer, bomb: str) -> None:
    response = asked(toy, grammar=bomb)
    assert response.status_code == 400, response.text
    assert said(toy.chat("Hello", response_format={"type": "regex", "regex": "ok"})) == "ok"


def test_a_deep_chain_of_references_is_followed(toy: RunningServer) -> None:
    """It would overflow a thread's usual stack where it is compiled."""
    links: Json = {f"n{i}": {"$ref": f"#/$defs/n{i + 1}"} for i in range(5000)}
    schema = {"$defs": {**links, "n5000": {"const": "end"}}, "$ref": "#/$defs/n0"}
    assert said(toy.chat("Hello", response_format=of_schema(schema))) == '"end"'


def test_nested_json_is_refused(toy: RunningServer) -> None:
    for depth in (150, 50_000):
        deep = '{"items":' * depth + "{}" + "}" * depth
        content = (
            '{"model":"toy","messages":[{"role":"user","content":"x"}],"response_format":{"type":"json_schema","json_schema":{"schema":'
            + deep
            + "}}}"
        )
        response = toy.http.post("/v1/chat/completions", content=content)
        assert response.status_code == 400, response.text


def test_a_client_that_leaves_while_its_grammar_is_compiled_harms_no_other(toy: RunningServer) -> None:
    with pytest.raises(httpx.ReadTimeout):
        toy.http.post(
            "/v1/chat/completions",
            json={
                "model": "toy",
                "messages": [{"role": "user", "content": "x"}],
                "grammar": BOMBS["intersections"].replace("{39}", "{41}"),
            },
            timeout=0.3,
        )
    assert said(toy.chat("Hello", response_format={"type": "regex", "regex": "still"})) == "still"


def test_without_a_grammar_there_is_no_process_for_checking(start_server: Any) -> None:
    server = start_server("--model", "toy=toy:")
    server.chat("Hello")
    assert server.processes("headstart.engine.grammar_check") == []
    server.chat("Hello", response_format={"type": "json_object"})
    assert len(server.processes("headstart.engine.grammar_check")) == 1
    processes = server.processes()
    server.stop()
    eventually(lambda: not any(process.is_running() for process in processes))


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab0-_:=|*+?()[]{}\"'\\/#\n ", max_size=40))
def test_whatever_is_written_in_gbnf_becomes_a_grammar_or_is_refused(text: str) -> None:
    for grammar in ("root ::= " + text, text + "\nroot ::= " + text):
        with suppress(BadRequest):
            written_grammar(grammar, "grammar")
