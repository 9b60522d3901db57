"""Bodies that are wrong somewhere, deep, wide or long, on all routes."""

from __future__ import annotations

import contextlib
from typing import Any

from hypothesis import strategies as st

from fuzz import hostile, wire
from fuzz.victim import Refused, Victim

Json = dict[str, Any]

CHAT: Json = {
    "model": "toy",
    "messages": [
        {"role": "system", "content": "You answer."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "done"},
        {"role": "user", "content": "Go on"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "stop": ["x"],
    "max_tokens": 2,
    "temperature": 0,
    "logit_bias": {"1": 1},
    "stream": False,
}
MESSAGE: Json = {
    "model": "toy",
    "max_tokens": 2,
    "system": [{"type": "text", "text": "You answer.", "cache_control": {"type": "ephemeral"}}],
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
}
# By route: a body that is right.
BODIES: dict[str, Json] = {
    "POST /v1/chat/completions": CHAT,
    "POST /v1/completions": {
        "model": "toy",
        "prompt": "Hello",
        "max_tokens": 2,
        "suffix": None,
        "grammar": None,
    },
    "POST /v1/responses": {
        "model": "toy",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
        "instructions": "You answer.",
        "tools": [{"type": "function", "name": "f", "parameters": {}}],
        "max_output_tokens": 2,
        "text": {"format": {"type": "text"}},
        "metadata": {},
        "store": False,
    },
    "POST /v1/messages": MESSAGE,
    "POST /v1/messages/count_tokens": MESSAGE,
    "POST /v1/embeddings": {"model": "toy", "input": ["Hello", "there"]},
    "POST /tokenize": {"model": "toy", "content": "Hello"},
    "POST /detokenize": {"model": "toy", "tokens": [1, 2, 3]},
    "POST /apply-template": {"model": "toy", "messages": CHAT["messages"], "tools": CHAT["tools"]},
    "POST /v1/cache/toy": {
        "cache_name": "attack",
        "messages": [{"role": "system", "content": "You answer."}],
        "for": ["chat"],
        "metadata": {"a": "b"},
        "ttl_seconds": 1,
        "description": "",
    },
    "PATCH /v1/cache/toy/attack": {"ttl_seconds": None, "metadata": {}, "pinned": True, "description": ""},
    "POST /v1/verify": {"cache_name": "attack", "repair": False},
    "POST /v1/models/load": {"model": "toy"},
    "POST /v1/models/unload": {"model": "nothing"},
    "DELETE /v1/cache/toy/attack": {},
    "DELETE /v1/responses/resp_0": {},
}


def _known(route: str, path: list[Any], value: Any) -> Json:
    return {"kind": "bodies", "route": route, "changes": [[path, value]]}


def _arguments(depth: int) -> Json:
    """The text of JSON of this depth, as JSON writes a string."""
    return {"$raw": [['"', 1], ['{\\"a\\":', depth], ["1", 1], ["}", depth], ['"', 1]]}


ARGUMENTS = ["messages", 2, "tool_calls", 0, "function", "arguments"]
KNOWN: list[Json] = [
    _known("POST /v1/chat/completions", ARGUMENTS, _arguments(10_000)),
    _known("POST /apply-template", ARGUMENTS, _arguments(10_000)),
    *(
        _known(route, ["messages"], {"$listed": [{"role": "user", "content": ""}, 500_000]})
        for route in (
            "POST /v1/chat/completions",
            "POST /v1/messages",
            "POST /apply-template",
            "POST /v1/cache/toy",
        )
    ),
    _known("POST /v1/responses", ["input"], {"$listed": [{"role": "user", "content": ""}, 300_000]}),
    *(
        _known(route, ["x"], {"$wide": 1_000_000})
        for route in ("POST /v1/chat/completions", "POST /tokenize")
    ),
    *(
        _known(route, ["x"], {"$raw": [[part, 100_000], [end, 100_000]]})
        for route in BODIES
        for part, end in (("[", "]"), ('{"a":', "}"))
    ),
    _known("POST /v1/chat/completions", ["grammar"], "root ::= nowhere"),
    _known("POST /v1/completions", ["grammar"], {"$raw": [['"root ::= ', 1], ["(", 30_000], ['"', 1]]}),
    _known(
        "POST /v1/chat/completions",
        ["tools", 0, "function", "parameters"],
        {"$raw": [['{"items":', 200], ["{}", 1], ["}", 200]]},
    ),
    _known(
        "POST /v1/messages",
        ["tools", 0, "input_schema"],
        {"$raw": [['{"items":', 5000], ["{}", 1], ["}", 5000]]},
    ),
    _known("POST /v1/chat/completions", ["chat_template_kwargs"], {"$wide": 100_000}),
]


def recipes() -> st.SearchStrategy[Json]:
    return st.sampled_from(sorted(BODIES)).flatmap(_of)


def _of(route: str) -> st.SearchStrategy[Json]:
    places = [*wire.paths(BODIES[route]), ["x"], ["stream"], ["n"], ["use_cache"], ["save_as"], ["grammar"]]
    places += [["chat_template_kwargs"], ["structured_outputs"], ["stream_options"], ["prompt"], ["echo"]]
    change = st.tuples(st.sampled_from(places), hostile.values()).map(list)
    return st.fixed_dictionaries(
        {"kind": st.just("bodies"), "route": st.just(route), "changes": st.lists(change, max_size=3)},
        optional={"cut": st.integers(0, 400), "before": st.sampled_from(["\ufeff", " ", "[", "\0"])},
    )


def attack(victim: Victim, recipe: Json) -> None:
    body: Any = BODIES[recipe["route"]]
    for path, value in recipe["changes"]:
        body = wire.replaced(body, path, value)
    content = recipe.get("before", "").encode() + wire.encoded(body)
    method, path = recipe["route"].split()
    with contextlib.suppress(Refused):
        victim.send(method, path, content[: recipe["cut"]] if "cut" in recipe else content)
