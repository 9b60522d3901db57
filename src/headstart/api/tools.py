"""Tools in request bodies: definitions as OpenAI has them, and calls in earlier turns. Both are for the chat
template to write."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from pydantic import AfterValidator


def _function(value: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for what is no function, or can't be kept."""
    function = value.get("function")
    if value.get("type", "function") != "function" or not isinstance(function, dict):
        raise ValueError('Input should be {"type": "function", "function": {"name": ...}}')
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError("A function needs a name")
    if not _is_json(value):
        raise ValueError("Input should be valid JSON")
    return value


def _is_json(value: dict[str, Any]) -> bool:
    """Half a surrogate pair and NaN are not."""
    try:
        return bool(msgspec.json.decode(msgspec.json.encode(value)) == value)
    except (ValueError, RecursionError):
        return False


def _call(value: dict[str, Any]) -> dict[str, Any]:
    """Templates want the arguments as an object, OpenAI's clients send its text."""
    function = _function(value)["function"]
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return value
    try:
        parsed = msgspec.json.decode(arguments)
    except msgspec.DecodeError:
        return value
    return {**value, "function": {**function, "arguments": parsed}} if isinstance(parsed, dict) else value


def _json(value: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for what can't be kept."""
    if not _is_json(value):
        raise ValueError("Input should be valid JSON")
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_json)]
Tool = Annotated[dict[str, Any], AfterValidator(_function)]
ToolCall = Annotated[dict[str, Any], AfterValidator(_call)]
