"""Answers with reasoning and calls, as Anthropic's API writes them: whole, and in events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from headstart.api.answer import AnswerStream, body
from headstart.api.anthropic.response import MessageWriter
from headstart.prompt.answer_parts import CallDelta
from headstart.protocol import Stats
from headstart.service.interface.answer import Delta, Ended, Result

STATS = Stats(20, 8, 12, 9, "slot", 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0)
ANSWER: list[Delta | Ended] = [
    Delta(0, reasoning="I sh"),
    Delta(0, reasoning="ould look."),
    Delta(0, text="Let me "),
    Delta(0, text="look."),
    Delta(0, call=CallDelta(0, "call_1", "look")),
    Delta(0, call=CallDelta(0, arguments='{"where": ')),
    Delta(0, call=CallDelta(0, arguments='"sea"}')),
    Delta(0, call=CallDelta(1, "call_2", "wait", "{}")),
    Delta(0, text="Done."),
    Ended(0, "tool_calls"),
]
CONTENT: Any = [
    {"type": "thinking", "thinking": "I should look.", "signature": ""},
    {"type": "text", "text": "Let me look."},
    {"type": "tool_use", "id": "call_1", "name": "look", "input": {"where": "sea"}},
    {"type": "tool_use", "id": "call_2", "name": "wait", "input": {}},
    {"type": "text", "text": "Done."},
]


async def events(answer: list[Delta | Ended]) -> AsyncGenerator[Delta | Ended | Result, None]:
    for event in answer:
        yield event
    yield Result(n_tokens=9, stats=STATS)


def message(*, with_reasoning: bool = True) -> MessageWriter:
    return MessageWriter("toy", 20, None, with_reasoning=with_reasoning)


async def streamed(answer: list[Delta | Ended]) -> list[Any]:
    data = b"".join([piece async for piece in AnswerStream(events(answer), message()).writes()]).decode()
    return [json.loads(block.partition("\ndata: ")[2]) for block in data.strip().split("\n\n")]


def gathered(told: list[Any]) -> list[Any]:
    """The content that a client makes of events."""
    content: list[Any] = []
    written = ""
    for event in told:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(content)
                content.append(event["content_block"])
                written = ""
            case "content_block_delta":
                assert event["index"] == len(content) - 1
                kind = event["delta"].pop("type")
                ((name, piece),) = event["delta"].items()
                if kind == "input_json_delta":
                    written += piece
                else:
                    content[-1][name] += piece
            case "content_block_stop":
                assert event["index"] == len(content) - 1
                if written:
                    content[-1]["input"] = json.loads(written)
    return content


async def test_reasoning_text_and_calls_are_blocks_in_the_order_they_came() -> None:
    whole = await body(events(ANSWER), message())
    assert whole["content"] == CONTENT
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("tool_use", None)
    assert whole["usage"]["input_tokens"] == 12
    assert whole["usage"]["cache_read_input_tokens"] == 8


async def test_events_make_the_same_content() -> None:
    told = await streamed(ANSWER)
    assert gathered(told) == CONTENT
    kinds = [event["type"] for event in told]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(CONTENT)
    assert told[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


async def test_reasoning_that_was_not_asked_for_is_not_told() -> None:
    whole = await body(events(ANSWER), message(with_reasoning=False))
    assert whole["content"] == CONTENT[1:]


@pytest.mark.parametrize("arguments", ["", '{"where": "se', "[1]"])
async def test_arguments_that_were_cut_off_are_none(arguments: str) -> None:
    answer: list[Delta | Ended] = [
        Delta(0, call=CallDelta(0, "call_1", "look", arguments)),
        Ended(0, "length"),
    ]
    whole = await body(events(answer), message())
    assert whole["content"] == [{"type": "tool_use", "id": "call_1", "name": "look", "input": {}}]
    assert whole["stop_reason"] == "max_tokens"
