"""What clients send that can't be served: each gets its status, and the error in the one shape."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import EllipsisType
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest

from conftest import StartServer
from headstart.api.middleware import Faults, RequestIds
from servers import Json, RunningServer, events, eventually, running_server, said

CHAT, TEXT, CACHE = "/v1/chat/completions", "/v1/completions", "/v1/cache/toy"
USER = {"role": "user", "content": "Why?"}
SHAPE = {"message", "type", "param", "code"}
# More than the toy's context of 4096 tokens.
TOO_LONG = "x" * 5000


def refused(
    response: httpx.Response,
    status: int,
    code: str | None,
    param: str | EllipsisType | None = ...,
    more: frozenset[str] = frozenset(),
) -> Json:
    """The error object, in the one shape; `more` are the keys it has beyond."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert body.keys() == {"error"}
    error: Json = body["error"]
    assert error.keys() == SHAPE | more
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert error["code"] == code
    if param is not ...:
        assert error["param"] == param
    return error


@dataclass(frozen=True)
class Bad:
    """A request and how it is refused."""

    claim: str
    path: str
    body: Json | bytes | None
    status: int = 400
    code: str = "invalid_value"
    param: str | EllipsisType | None = ...
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)
    more: frozenset[str] = frozenset()

    def send(self, http: httpx.Client) -> None:
        content = self.body if isinstance(self.body, bytes | None) else json.dumps(self.body).encode()
        response = http.request(self.method, self.path, content=content, headers=self.headers)
        refused(response, self.status, self.code, self.param, self.more)


def chat(claim: str, param: str | EllipsisType | None = ..., /, **fields: Any) -> Bad:
    """A chat that is good but for these fields; one that is `...` is left out."""
    return Bad(
        claim, CHAT, _kept({"model": "toy", "messages": [USER], "max_tokens": 4} | fields), param=param
    )


def text(claim: str, param: str | EllipsisType | None = ..., /, **fields: Any) -> Bad:
    return Bad(claim, TEXT, _kept({"model": "toy", "prompt": "Why?", "max_tokens": 4} | fields), param=param)


def cache(claim: str, param: str | EllipsisType | None = ..., /, **fields: Any) -> Bad:
    return Bad(
        claim, CACHE, _kept({"cache_name": "refused", "prompt": "You are terse."} | fields), param=param
    )


def _kept(fields: Json) -> Json:
    return {name: value for name, value in fields.items() if value is not ...}


def each(cases: list[Bad]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.claim) for bad in cases])


BAD_NAMES = {
    "empty": "",
    "a slash": "a/b",
    "the directory above": "../a",
    "a backslash": "a\\b",
    "two dots": "..",
    "a leading dot": ".hidden",
    "a leading hyphen": "-a",
    "a space": "a b",
    "an umlaut": "ä",
    "another script": "名前",
    "a line break at the end": "a\n",
    "a NUL": "a\0b",
    "65 letters": "x" * 65,
}


def named(what: str, name: str) -> list[Bad]:
    """A bad name, at each place where one can be given."""
    code = "invalid_cache_name"
    url = f"{CACHE}/{quote(name, safe='').replace('.', '%2E')}"
    body = {"cache_name": name, "prompt": "You are terse."}
    use: Json = {"model": "toy", "use_cache": name}
    return [
        Bad(f"create, {what}", CACHE, body, code=code, param="cache_name"),
        Bad(f"use in a chat, {what}", CHAT, {**use, "messages": [USER]}, code=code, param="use_cache"),
        Bad(f"use in a completion, {what}", TEXT, {**use, "prompt": "a"}, code=code, param="use_cache"),
        Bad(f"show, {what}", url, None, code=code, param="name", method="GET"),
        Bad(f"delete, {what}", url, None, code=code, param="name", method="DELETE"),
    ]


NAMES = [bad for what, name in BAD_NAMES.items() for bad in named(what, name)]


def missing_model(claim: str, method: str, path: str, body: Json | None = None) -> Bad:
    return Bad(claim, path, body, 404, "model_not_found", "model", method)


UNKNOWN_MODELS = [
    missing_model("chat", "POST", CHAT, {"model": "none", "messages": [USER]}),
    missing_model("completion", "POST", TEXT, {"model": "none", "prompt": "a"}),
    missing_model("streamed chat", "POST", CHAT, {"model": "none", "messages": [USER], "stream": True}),
    missing_model("model with an empty name", "POST", CHAT, {"model": "", "messages": [USER]}),
    missing_model("create", "POST", "/v1/cache/none", {"cache_name": "a", "prompt": "b"}),
    missing_model("list", "GET", "/v1/cache/none"),
    missing_model("show", "GET", "/v1/cache/none/a"),
    missing_model("delete", "DELETE", "/v1/cache/none/a"),
    missing_model("show model", "GET", "/v1/models/none"),
]


def missing_cache(claim: str, method: str, path: str, param: str, body: Json | None = None) -> Bad:
    return Bad(claim, path, body, 404, "cache_not_found", param, method)


UNKNOWN_CACHES = [
    missing_cache(
        "chat", "POST", CHAT, "use_cache", {"model": "toy", "use_cache": "never-made", "messages": [USER]}
    ),
    missing_cache(
        "streamed chat",
        "POST",
        CHAT,
        "use_cache",
        {"model": "toy", "use_cache": "never-made", "messages": [USER], "stream": True},
    ),
    missing_cache(
        "completion", "POST", TEXT, "use_cache", {"model": "toy", "use_cache": "never-made", "prompt": "a"}
    ),
    missing_cache("show", "GET", f"{CACHE}/never-made", "name"),
    missing_cache("delete", "DELETE", f"{CACHE}/never-made", "name"),
]

PROMPTS = [
    cache("a cache of nothing", "prompt", prompt=""),
    cache("a cache without prompt", "prompt", prompt=...),
    cache("a cache without name", "cache_name", cache_name=...),
    cache("a cache of a number", "prompt", prompt=5),
    cache("a cache of several prompts", "prompt", prompt=["a", "b"]),
    cache("a cache for nothing", "for", **{"for": []}),
    cache("a cache for something unknown", ..., **{"for": ["images"]}),
    cache("a cache with half a surrogate pair", ..., prompt="\ud800"),
    text("an empty prompt", "prompt", prompt=""),
    text("a list with an empty prompt", "prompt", prompt=[""]),
    text("no prompt", "prompt", prompt=...),
    text("null for a prompt", "prompt", prompt=None),
    text("an empty prompt among others", "prompt", prompt=["a", ""]),
    text("no prompt in the list", "prompt", prompt=[]),
    text("token ids below 0", "prompt", prompt=[1, -2]),
    text("token ids that the model doesn't have", "prompt", prompt=[1, 270, 100_000]),
    text("huge token ids", "prompt", prompt=[10**30]),
    text("fractions for token ids", "prompt", prompt=[1.5]),
    text("truth for a token id", "prompt", prompt=[True]),
    text("texts and token ids", "prompt", prompt=["a", [1]]),
    text("an empty list of token ids", "prompt", prompt=[[1], []]),
    text("more prompts than fit", "prompt", prompt=["a"] * 129),
    text("an empty prompt, streamed", "prompt", prompt="", stream=True),
    text("a prompt with half a surrogate pair", ..., prompt="a\ud800"),
    text("no model", "model", model=...),
    chat("null for a model", "model", model=None),
]

STREAMED_CREATIONS = [
    replace(cache("a bad name", "cache_name", cache_name="../a", stream=True), code="invalid_cache_name"),
    cache("an empty prompt", "prompt", prompt="", stream=True),
]

MESSAGES = [
    chat("no messages", "messages", messages=...),
    chat("null for messages", "messages", messages=None),
    chat("an empty list", "messages", messages=[]),
    chat("an object for messages", "messages", messages=USER),
    chat("a text for messages", "messages", messages="Why?"),
    chat("a text for a message", ..., messages=["Why?"]),
    chat("an empty message", ..., messages=[{}]),
    chat("an unknown role", ..., messages=[{"role": "king", "content": "a"}]),
    chat("no role", ..., messages=[{"content": "a"}]),
    chat("no content", ..., messages=[{"role": "user"}]),
    chat("null for content", ..., messages=[{"role": "user", "content": None}]),
    chat("a number for content", ..., messages=[{"role": "user", "content": 5}]),
    chat("a text for a part", ..., messages=[{"role": "user", "content": ["a"]}]),
    chat("a part without text", ..., messages=[{"role": "user", "content": [{"type": "text"}]}]),
    chat(
        "a part that is an image",
        ...,
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}],
    ),
    chat("a second message that is bad", ..., messages=[USER, {"role": "user"}]),
    chat("half a surrogate pair", ..., messages=[{"role": "user", "content": "\udc00"}]),
]

VALUES = [
    *(
        make(f"{name} = {value!r}"[:60], name, **{name: value})
        for make in (chat, text)
        for name, value in (
            ("max_tokens", -1),
            ("max_tokens", 1.5),
            ("max_tokens", "many"),
            ("temperature", -0.1),
            ("temperature", 2.1),
            ("temperature", "hot"),
            ("top_p", 1.1),
            ("top_k", -2),
            ("top_k", 10**30),
            ("min_p", -1),
            ("presence_penalty", 3),
            ("frequency_penalty", -3),
            ("repeat_penalty", 0),
            ("repeat_last_n", -1),
            ("seed", "lucky"),
            ("seed", 10**30),
            ("stop", ["a", "b", "c", "d", "e"]),
            ("stop", ""),
            ("stop", ["a", ""]),
            ("stop", [1]),
            ("stop", "x" * 1001),
            ("stream", "perhaps"),
            ("cache_prompt", "perhaps"),
            ("use_cache", 5),
            ("n", 0),
            ("n", 129),
            ("n", 1.5),
            ("logit_bias", {"5": 101}),
            ("logit_bias", {"5": "much"}),
            ("logit_bias", {"-1": 1}),
            ("logit_bias", {str(10**30): 1}),
            ("logit_bias", {str(i): 1 for i in range(1025)}),
            ("logit_bias", [5]),
            ("ignore_eos", "perhaps"),
        )
    ),
    chat("logprobs = 3", "logprobs", logprobs=3),
    chat("top_logprobs = 21", "top_logprobs", logprobs=True, top_logprobs=21),
    text("logprobs = true", "logprobs", logprobs=True),
    text("logprobs = 21", "logprobs", logprobs=21),
    text("best_of = 0", "best_of", best_of=0),
    text("suffix = 5", "suffix", suffix=5),
    text("echo = 'perhaps'", "echo", echo="perhaps"),
    chat("max_completion_tokens = -1", "max_completion_tokens", max_completion_tokens=-1),
    chat("stream_options = 3", "stream_options", stream_options=3),
    Bad(
        "temperature = NaN", TEXT, b'{"model": "toy", "prompt": "a", "temperature": NaN}', param="temperature"
    ),
]

UNSUPPORTED = [
    chat("more answers than slots", "n", n=5),
    chat("functions", "functions", functions=[{"name": "f"}]),
    chat("a call of a function", "function_call", function_call={"name": "f"}),
    chat("JSON of no schema", "response_format", response_format={"type": "json_schema"}),
    chat("top log probabilities alone", "top_logprobs", top_logprobs=2),
    chat("a bias for a token that the model doesn't have", "logit_bias", logit_bias={"100000": 1}),
    chat("a search of the web", "web_search_options", web_search_options={}),
    chat("sound", "modalities", modalities=["text", "audio"]),
    text("the best of three", "best_of", best_of=3),
    text("an echo with log probabilities", "echo", echo=True, logprobs=1),
    text("a suffix for a model that knows no gaps", "suffix", suffix="the end"),
]

HARMLESS: list[Json] = [
    {"n": 1},
    {"n": None},
    {"tools": []},
    {"tools": None},
    {"response_format": {"type": "text"}},
    {"logprobs": False},
    {"logit_bias": {}},
    {"top_logprobs": 0},
    {"best_of": 1, "suffix": "", "echo": False},
    {"function_call": "none", "audio": None},
    {"modalities": ["text"]},
    {"stop": []},
    {"stop": None},
    {"seed": -1},
    {"max_tokens": 10**30},
    {"stream": None, "stream_options": None},
    {"user": "u", "metadata": {"a": "b"}, "store": False, "prompt_cache_key": "k", "service_tier": "auto"},
    {"parallel_tool_calls": True, "reasoning_effort": "low", "no_such_thing": [1, {"two": None}]},
]

BODIES = [
    Bad(f"{what} to {path}", path, body)
    for path in (CHAT, TEXT, CACHE)
    for what, body in {
        "nothing": b"",
        "half an object": b'{"model": ',
        "a form": b"model=toy&prompt=a",
        "a list": b"[]",
        "null": b"null",
        "a text": b'"toy"',
        "bytes that are not UTF-8": b'{"model": "toy", "prompt": "\xff\xfe", "cache_name": "a"}',
        "very deep lists": b"[" * 100_000,
        "a number of 5000 digits": b'{"model": "toy", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    }.items()
]

LONG = [
    Bad(
        f"{what}, {'streamed' if stream else 'whole'}",
        path,
        {"model": "toy", "stream": stream, **body},
        code="context_length_exceeded",
        param=param,
        more=frozenset({"n_prompt_tokens", "n_ctx"}),
    )
    for stream in (False, True)
    for what, path, param, body in (
        ("chat", CHAT, "messages", {"messages": [{"role": "user", "content": TOO_LONG}]}),
        ("completion", TEXT, "prompt", {"prompt": TOO_LONG}),
        ("cache", CACHE, "prompt", {"cache_name": "long", "prompt": TOO_LONG}),
    )
]

GOOD_TEXT = json.dumps({"model": "toy", "prompt": "a", "max_tokens": 4, "temperature": 0}).encode()
FORM_TYPES = ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=b", ""]
FOREIGN = [
    Bad(
        f"content type {form or 'missing'}",
        TEXT,
        GOOD_TEXT,
        headers={"origin": "https://elsewhere.example"} | ({"content-type": form} if form else {}),
    )
    for form in FORM_TYPES
]

EVERYTHING = [
    *NAMES,
    *UNKNOWN_MODELS,
    *UNKNOWN_CACHES,
    *PROMPTS,
    *STREAMED_CREATIONS,
    *MESSAGES,
    *VALUES,
    *UNSUPPORTED,
    *BODIES,
    *LONG,
    *FOREIGN,
]


@each(NAMES)
def test_a_name_that_is_not_safe_as_a_file_name_is_refused(toy: RunningServer, bad: Bad) -> None:
    bad.send(toy.http)


@each(UNKNOWN_MODELS)
def test_a_model_that_is_not_served_is_not_found(toy: RunningServer, bad: Bad) -> None:
    bad.send(toy.http)


@each(UNKNOWN_CACHES)
def test_a_cache_that_was_not_created_is_not_found(toy: RunningServer, bad: Bad) -> None:
    bad.send(toy.http)


@each(PROMPTS)
def test_a_prompt_that_is_missing_empty_or_no_text_is_refused(toy: RunningServer, bad: Bad) -> None:
    bad.send(toy.http)


@each(STREAMED_CREATIONS)
def test_a_creation_that_would_report_progress_is_refused_before_its_stream_begins(
    toy: RunningServer, bad: Bad
) -> None:
    bad.send(toy.http)


@each(MESSAGES)
def test_messages_of_another_shape_are_refused(toy: RunningServer, bad: Bad) -> None:
    bad.send(toy.http)


@each(VALUES)
def test_a_value_of_the_wrong_type_or_out_of_range_is_refused(toy: RunningServer, bad: Bad) -> None:
    bad.send(toy.http)


@each(UNSUPPORTED)
def test_a_parameter_that_can_not_be_honoured_is_refused(toy: RunningServer, bad: Bad) -> None:
    bad.send(toy.http)


@pytest.mark.parametrize("fields", HARMLESS, ids=str)
def test_unknown_fields_and_values_that_ask_for_nothing_are_accepted(
    toy: RunningServer, fields: Json
) -> None:
    plain = toy.chat("Why?")
    assert said(toy.chat("Why?", **fields)).startswith(said(plain))
    if "max_tokens" not in fields:
        answer = toy.post(TEXT, model="toy", prompt="Why?", max_tokens=4, **fields)
        assert answer.status_code == 200, answer.text


def test_an_answer_of_no_tokens_is_empty(toy: RunningServer) -> None:
    answer = toy.chat("Why?", max_tokens=0)
    assert said(answer) == ""
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


@each(BODIES)
def test_a_body_that_is_not_a_json_object_is_refused(toy: RunningServer, bad: Bad) -> None:
    bad.send(toy.http)


@each(LONG)
def test_a_prompt_beyond_the_context_is_refused_with_both_figures(toy: RunningServer, bad: Bad) -> None:
    bad.send(toy.http)
    response = toy.http.post(bad.path, json=bad.body)
    error = response.json()["error"]
    assert error["n_ctx"] == 4096
    assert 5000 < error["n_prompt_tokens"] < 5100


def test_a_prompt_that_exceeds_the_context_only_with_its_cache_is_refused(toy: RunningServer) -> None:
    toy.create("half", "h" * 3000)
    more = frozenset({"n_prompt_tokens", "n_ctx"})
    use: Json = {"model": "toy", "use_cache": "half"}
    messages = [{"role": "user", "content": "x" * 2000}]
    refused(toy.post(CHAT, **use, messages=messages), 400, "context_length_exceeded", "messages", more)
    refused(toy.post(TEXT, **use, prompt="x" * 2000), 400, "context_length_exceeded", "prompt", more)


@pytest.mark.parametrize("content_type", [*FORM_TYPES, "application/json; charset=utf-8", "image/png"])
def test_json_is_accepted_whatever_its_content_type_says(toy: RunningServer, content_type: str) -> None:
    headers = {"content-type": content_type} if content_type else {}
    answer = toy.http.post(TEXT, content=GOOD_TEXT, headers=headers)
    assert answer.status_code == 200, answer.text


@each(FOREIGN)
def test_what_a_page_of_another_site_may_send_unasked_is_refused(toy: RunningServer, bad: Bad) -> None:
    bad.send(toy.http)


def test_a_page_that_says_json_itself_is_served(toy: RunningServer) -> None:
    headers = {"origin": "https://elsewhere.example", "content-type": "application/json"}
    assert toy.http.post(TEXT, content=GOOD_TEXT, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/"), ("GET", "/v1"), ("POST", "/v1/nothing"), ("GET", "/v2/models"), ("DELETE", "/cache")],
)
def test_an_unknown_path_is_not_found(toy: RunningServer, method: str, path: str) -> None:
    refused(toy.http.request(method, path), 404, "not_found", None)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", CHAT),
        ("GET", TEXT),
        ("PUT", CACHE),
        ("POST", f"{CACHE}/name"),
        ("POST", "/v1/cache"),
        ("DELETE", "/v1/models/toy"),
        ("POST", "/health"),
        ("OPTIONS", CHAT),
    ],
)
def test_a_method_that_a_path_does_not_have_is_refused(toy: RunningServer, method: str, path: str) -> None:
    response = toy.http.request(method, path)
    assert response.headers["allow"]
    refused(response, 405, response.json()["error"]["code"], None)


def test_a_body_over_the_limit_is_refused_unread(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:", env={"HEADSTART_MAX_BODY_MB": "0.01"})
    body = json.dumps({"model": "toy", "prompt": "a" * 20_000}).encode()

    def in_chunks() -> Iterator[bytes]:
        yield body[:10_000]
        yield body[10_000:]

    for content in (body, in_chunks()):
        response = httpx.post(server.url + TEXT, content=content)
        refused(response, 413, "body_too_large", None)
    assert server.post(TEXT, model="toy", prompt="a" * 2000, max_tokens=1).status_code == 200


def test_a_server_that_refused_everything_keeps_no_trace_and_still_answers(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    # Connections of its own, since a server may close one after an error.
    with httpx.Client(base_url=server.url, limits=httpx.Limits(max_keepalive_connections=0)) as http:
        for bad in EVERYTHING:
            body = bad.body if isinstance(bad.body, bytes | None) else json.dumps(bad.body).encode()
            http.request(bad.method, bad.path, content=body, headers=bad.headers)
    assert server.files() == []
    assert server.http.get("/v1/cache").json()["data"] == []
    assert server.chat("Why?")["usage"]["completion_tokens"] > 0


# From here on requests meet: on a model that takes 2 ms a token and never ends an answer by itself.

SLOW = "toy=toy:ms_per_token=2,eos=0"
LONG_PROMPT = "You count waves. " * 30


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("slow") / "cache", "--model", SLOW) as server:
        yield server


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that takes one request at a time and lets none wait."""
    directory: Path = tmp_path_factory.mktemp("single") / "cache"
    env = {"HEADSTART_MAX_WAITING": "0"}
    with running_server(directory, "--model", SLOW, "--slots", "1", env=env) as server:
        yield server


def content(event: Json) -> str:
    return "".join(choice["delta"].get("content", "") for choice in event["choices"])


def streamed_creation(name: str) -> Json:
    return {"cache_name": name, "prompt": LONG_PROMPT, "stream": True}


def streamed_chat(**fields: Any) -> Json:
    return {"model": "toy", "messages": [USER], "temperature": 0, "stream": True, **fields}


def is_served(server: RunningServer) -> bool:
    return server.post(TEXT, model="toy", prompt="a", max_tokens=1).status_code == 200


@pytest.mark.slow
def test_a_second_create_of_the_same_name_is_refused_while_the_first_is_built(slow: RunningServer) -> None:
    with slow.http.stream("POST", CACHE, json=streamed_creation("twice")) as building:
        progress = events(building)
        assert next(progress)["object"] == "cache.progress"
        second = slow.post(CACHE, cache_name="twice", prompt="Something else.")
        refused(second, 409, "cache_conflict", "cache_name")
        assert second.headers["x-should-retry"] == "false"
        *_, last = progress
    assert (last["object"], last["version"]) == ("cache.created", 1)
    assert slow.http.get(f"{CACHE}/twice").json()["prompt"] == LONG_PROMPT
    assert slow.chat("Why?", use_cache="twice", max_tokens=4)["usage"]["cache_hit"] is True


@pytest.mark.slow
def test_a_cache_can_not_be_deleted_while_it_is_built(slow: RunningServer) -> None:
    with slow.http.stream("POST", CACHE, json=streamed_creation("unfinished")) as building:
        progress = events(building)
        next(progress)
        refused(slow.http.delete(f"{CACHE}/unfinished"), 409, "cache_conflict")
        *_, last = progress
    assert last["object"] == "cache.created"
    assert slow.http.delete(f"{CACHE}/unfinished").status_code == 200


def test_a_cache_that_may_not_be_replaced_is_kept(slow: RunningServer) -> None:
    slow.create("kept", "You are the first.")
    response = slow.post(CACHE, cache_name="kept", prompt="You are the second.", allow_overwrite=False)
    refused(response, 409, "cache_conflict", "cache_name")
    assert response.headers["x-should-retry"] == "false"
    assert slow.http.get(f"{CACHE}/kept").json()["prompt"] == "You are the first."


def test_a_stream_ends_with_its_cache_although_that_is_deleted_meanwhile(slow: RunningServer) -> None:
    slow.create("dropped", "You are a drum.")
    usual = said(slow.chat("Why?", use_cache="dropped", max_tokens=200))
    with slow.http.stream("POST", CHAT, json=streamed_chat(use_cache="dropped", max_tokens=200)) as answer:
        chunks = events(answer)
        text = content(next(chunk for chunk in chunks if content(chunk)))
        assert slow.http.delete(f"{CACHE}/dropped").status_code == 200
        refused(slow.post(CHAT, **streamed_chat(use_cache="dropped")), 404, "cache_not_found", "use_cache")
        text += "".join(map(content, chunks))
    assert text == usual
    assert "toy/dropped.headstart" not in slow.files()


def test_more_requests_than_may_wait_are_told_to_come_back(single: RunningServer) -> None:
    with single.http.stream("POST", CHAT, json=streamed_chat()) as answer:
        chunks = events(answer)
        next(chunks)
        for path, body in (
            (CHAT, {"model": "toy", "messages": [USER]}),
            (CHAT, streamed_chat()),
            (TEXT, {"model": "toy", "prompt": "a"}),
            (CACHE, {"cache_name": "late", "prompt": "You are late."}),
            (CACHE, {"cache_name": "late", "prompt": "You are late.", "stream": True}),
        ):
            response = single.http.post(path, json=body)
            refused(response, 503, "overloaded", None)
            assert int(response.headers["retry-after"]) > 0
    eventually(lambda: is_served(single))
    assert "toy/late.headstart" not in single.files()


def test_a_client_that_leaves_its_stream_frees_the_slot(single: RunningServer) -> None:
    # The answer fills the context: some 8 seconds, were it not ended.
    with single.http.stream("POST", CHAT, json=streamed_chat()) as answer:
        chunks = events(answer)
        next(chunk for chunk in chunks if content(chunk))
        assert not is_served(single)
    eventually(lambda: is_served(single))


def send_and_keep_open(server: RunningServer, path: str, body: Json) -> socket.socket:
    address = urlsplit(server.url)
    assert address.hostname
    assert address.port
    connection = socket.create_connection((address.hostname, address.port))
    sent = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(sent)}\r\n\r\n"
    connection.sendall(head.encode() + sent)
    return connection


def has_scratch(server: RunningServer) -> bool:
    return any(".tmp-" in name for name in server.files())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_during_a_create_leaves_nothing_behind(
    single: RunningServer, stream: bool
) -> None:
    body = {**streamed_creation("abandoned"), "stream": stream}
    with closing(send_and_keep_open(single, CACHE, body)):
        eventually(lambda: has_scratch(single))
        eventually(lambda: not is_served(single))
    eventually(lambda: not has_scratch(single))
    eventually(lambda: is_served(single))
    refused(single.http.get(f"{CACHE}/abandoned"), 404, "cache_not_found")
    assert "toy/abandoned.headstart" not in single.files()


def test_a_client_that_leaves_while_its_request_waits_is_not_served(start_server: StartServer) -> None:
    server = start_server("--model", SLOW, "--slots", "1", env={"HEADSTART_MAX_WAITING": "1"})
    with server.http.stream("POST", CHAT, json=streamed_chat()) as answer:
        chunks = events(answer)
        next(chunk for chunk in chunks if content(chunk))
        waiting = send_and_keep_open(server, CACHE, {"cache_name": "waiting", "prompt": LONG_PROMPT})
        with closing(waiting):
            eventually(lambda: has_scratch(server))
        eventually(lambda: not has_scratch(server))
    eventually(lambda: is_served(server))
    assert server.files() == []


async def test_a_fault_of_the_server_is_told_in_the_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError

    transport = httpx.ASGITransport(RequestIds(Faults(broken)), raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        response = await http.get("/", headers={"x-request-id": "mine"})
    refused(response, 500, None, None)
    assert response.headers["x-request-id"] == "mine"
