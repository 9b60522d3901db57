"""Tools for templates without them: listed in the system message, with calls and their results as text, in
the Hermes format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from headstart.prompt.tool_calls.hermes import CLOSE, OPEN

Message = Mapping[str, Any]

OFFER = (
    "# Tools\n\n"
    "You may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n"
    "<tools>\n{tools}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within "
    f"{OPEN}{CLOSE} XML tags:\n"
    f'{OPEN}\n{{{{"name": <function-name>, "arguments": <args-json-object>}}}}\n{CLOSE}'
)


def written_out(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The same chat with tools, calls and tool messages written as text. Raises RecursionError for too deep
    nesting."""
    written: list[Message] = []
    answered = False
    for message in messages:
        if message["role"] != "tool":
            written.append(_with_calls(message))
        elif answered:
            last = written[-1]
            written[-1] = {**last, "content": f"{last['content']}\n{_response(message)}"}
        else:
            written.append({"role": "user", "content": _response(message)})
        answered = message["role"] == "tool"
    return _with_offer(written, tools) if tools else written


def _with_calls(message: Message) -> Message:
    if not (calls := message.get("tool_calls")):
        return message
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    texts = [message["content"], *map(_call, calls)]
    return {**rest, "content": "\n".join(filter(None, texts))}


def _call(call: Mapping[str, Any]) -> str:
    function = call["function"]
    call_fields = {"name": function["name"], "arguments": function.get("arguments", {})}
    return f"{OPEN}\n{json.dumps(call_fields, ensure_ascii=False)}\n{CLOSE}"


def _response(message: Message) -> str:
    return f"<tool_response>\n{message['content']}\n</tool_response>"


def _with_offer(messages: list[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    offer = OFFER.format(tools=listed)
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": offer}, *messages]
    first = messages[0]
    return [{**first, "content": f"{first['content']}\n\n{offer}"}, *messages[1:]]
