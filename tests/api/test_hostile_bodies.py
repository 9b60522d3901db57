"""Bodies that are deeper or wider than any code expects, on every route that there is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from headstart.api.dialects import DIALECTS
from headstart.json_scan import JsonScan
from headstart.limits import MAX_DEPTH
from headstart.prompt.tool_calls.scanner import ObjectReader
from raw_http import answer, connect, head, post, received
from servers import Json, RunningServer, running_server
from sweeps import swept

CHAT = "/v1/chat/completions"
ROUTES = [
    (method, route.path.replace("{model}", "toy").replace("{name:path}", "a").replace("{name}", "a"))
    for dialect in DIALECTS
    for router in dialect.routers
    for route in router.routes
    if isinstance(route, APIRoute)
    for method in sorted((route.methods or set()) - {"GET", "HEAD"})
]
USER = {"role": "user", "content": "a"}
# What makes it to each route's own fields.
FIELDS = (
    b'"model":"toy","max_tokens":1,"max_output_tokens":1,"cache_name":"wide","prompt":"a","input":"a",'
    b'"content":"a","tokens":[5],"messages":[{"role":"user","content":"a"}]'
)


def _nested(opening: bytes, inner: bytes, closing: bytes, depth: int) -> bytes:
    return opening * depth + inner + closing * depth


def _field(name: str, value: bytes) -> bytes:
    return b"{" + FIELDS + b',"' + name.encode() + b'":' + value + b"}"


DEEP_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":' * 10_000}}
NAMES = (
    "messages",
    "tools",
    "metadata",
    "prompt",
    "input",
    "tokens",
    "stop",
    "use_cache",
    "response_format",
    "x",
)
HOSTILE: dict[str, bytes] = {
    "brackets alone": b"[" * 1_000_000,
    "quotes alone": b'"' * 4_000_000,
    "backslashes": b'{"a": "' + b"\\" * 4_000_000,
    "no UTF-8": json.dumps({"model": "toy"}).encode("utf-16"),
    "a million keys": _field("x", b"{" + b",".join(b'"k%d":1' % i for i in range(1_000_000)) + b"}"),
    "unknown fields": b"{" + FIELDS + b"".join(b',"k%d":1' % i for i in range(90_000)) + b"}",
    "the same key again and again": b'{"messages":' + b'[],"messages":' * 40_000 + b"[]}",
    "many digits": _field("x", b"1" * 1_000_000),
    "calls with deep arguments": _field(
        "messages",
        json.dumps([USER, {"role": "assistant", "content": "", "tool_calls": [DEEP_CALL]}, USER]).encode(),
    ),
    "calls with wide arguments": _field(
        "messages",
        json.dumps(
            [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {
                            "id": "c",
                            "type": "function",
                            "function": {"name": "f", "arguments": "[{}" + ",{}" * 40_000},
                        }
                    ],
                }
            ]
            * 20
        ).encode(),
    ),
    "a deep call as an item": _field(
        "input",
        json.dumps(
            [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "[" * 10_000}]
        ).encode(),
    ),
} | {
    f"{what} in {name}": _field(name, value)
    for name in NAMES
    for what, value in {
        "10,000 lists": _nested(b"[", b"", b"]", 10_000),
        "10,000 objects": _nested(b'{"a":', b"1", b"}", 10_000),
        "as deep as may be": _nested(b'{"a":', b"1", b"}", MAX_DEPTH - 1),
        "500,000 empty objects": b"[" + b"{}," * 500_000 + b"{}]",
        "40,000 empty objects": b"[" + b"{}," * 40_000 + b"{}]",
        "10,001 messages": json.dumps([USER] * 10_001).encode(),
        "a million numbers": b"[" + b"1," * 1_000_000 + b"1]",
        "90,000 texts": b"[" + b'"a",' * 90_000 + b'"a"]',
    }.items()
}
CASES = [(method, path, what) for what in HOSTILE for method, path in ROUTES]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory: Path = tmp_path_factory.mktemp("hostile") / "cache"
    with running_server(directory, "--model", "toy=toy:template=tools") as running:
        yield running
        # Nothing was a fault of the server's.
        assert "Traceback" not in running.log.read_text()


@pytest.mark.sweep
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_route_fails_on_a_deep_or_wide_body(server: RunningServer) -> None:
    for method, path, what in swept(CASES):
        response = server.http.request(method, path, content=HOSTILE[what])
        about = f"{method} {path}, {what}: {response.status_code} {response.text[:300]}"
        assert response.status_code < 500 or response.status_code == 503, about
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error["message"], about
            assert path.startswith("/v1/messages") or {"type", "param", "code"} <= error.keys(), about
        assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("what", "said"),
    {
        "10,000 lists in x": "nested deeper than 64 levels",
        "500,000 empty objects in messages": "more than 50000 objects and lists",
        "a million keys": "more than 100000 strings",
        "a million numbers in prompt": "more than 320000 values",
        "unknown fields": "more than 200 unknown fields",
        "10,001 messages in messages": "at most 10000 items",
        "calls with deep arguments": "nested at most 56 levels",
        "calls with wide arguments": "more than 320000 values",
    }.items(),
)
def test_a_refusal_names_the_limit(server: RunningServer, what: str, said: str) -> None:
    response = server.http.post(CHAT, content=HOSTILE[what])
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]


def test_what_an_agent_sends_is_far_within_the_limits(server: RunningServer) -> None:
    parameters: Json = {"type": "object", "properties": {}}
    for i in range(12):
        parameters["properties"][f"p{i}"] = {"type": "array", "items": {"anyOf": [{"type": "string"}, {}]}}
    tools = [
        {"type": "function", "function": {"name": f"tool_{i}", "parameters": parameters}} for i in range(30)
    ]
    text = 'def f(x):\n    return {"a": [x, "\\\\"]}\n' * 60
    turns: list[Any] = [{"role": "user", "content": text}, {"role": "assistant", "content": text}] * 40
    body = {"model": "toy", "messages": [*turns, USER], "tools": tools, "max_tokens": 1}
    error = server.post(CHAT, **body).json()["error"]
    assert error["code"] == "context_length_exceeded"


def test_health_is_answered_before_hostile_bodies_that_came_first(server: RunningServer) -> None:
    texts = json.dumps([USER] * 10_000).encode()
    hostile = [
        HOSTILE["500,000 empty objects in messages"],
        HOSTILE["unknown fields"],
        _field("messages", texts),
    ]
    for body in hostile:
        with connect(server) as first, connect(server) as second:
            first.sendall(post(CHAT, body, "connection: close"))
            second.sendall(head("GET", "/health", "connection: close"))
            assert answer(received(second)).status == 200
            first.setblocking(False)
            with pytest.raises(BlockingIOError):
                first.recv(1)
            first.settimeout(60)
            assert answer(received(first)).status == 400


def test_calls_that_a_model_writes_too_deep_are_no_calls() -> None:
    with pytest.raises(ValueError, match="deeper than 64"):
        ObjectReader().read('{"type": "function", "a": ' + '{"a":' * 500 + "1" + "}" * 501)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_body_is_measured_alike_however_it_is_cut(size: int) -> None:
    value = {'a"[': ["\\", '\\"', {"b\\\\": [[], {"c": "]}{,:"}]}], "d": ["ä", 1, None, [[["x"]]]]}
    text = json.dumps(value).encode()
    scan, deepest = JsonScan(), 0
    for at in range(0, len(text), size):
        scan.feed(text[at : at + size])
        deepest = max(deepest, scan.depth)
    assert (scan.containers, scan.strings, scan.depth) == (10, 9, 0)
    assert size > 1 or deepest == 5
