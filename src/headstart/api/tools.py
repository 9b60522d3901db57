"""Tools and reasoning in request bodies: definitions as OpenAI has them, calls in earlier turns, both for the
chat template to write, and what the answer is to call."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator

from headstart.service.calling import Calling


def _function(value: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for what is no function, or can't be kept."""
    function = value.get("function")
    if value.get("type", "function") != "function" or not isinstance(function, dict):
        raise ValueError('Input should be {"type": "function", "function": {"name": ...}}')
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError("A function needs a name")
    if not isinstance(function.get("parameters", {}), dict | None):
        raise ValueError("A function's parameters are a JSON schema, which is an object")
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
ReasoningFormat = Literal["none", "auto", "deepseek"]


def _plain(variables: dict[str, Any]) -> dict[str, Any]:
    if not all(isinstance(value, str | int | float | None) for value in variables.values()):
        raise ValueError("Values should be texts, numbers, true, false or null")
    if not _is_json(variables):
        raise ValueError("Input should be valid JSON")
    return variables


TemplateVariables = Annotated[dict[str, Any], AfterValidator(_plain)]


def _tool_choice(value: Any) -> str | dict[str, Any]:
    """A word, or the function's name in the form that OpenAI has for it."""
    match value:
        case "none" | "auto" | "required":
            return str(value)
        case {"type": "function", "function": {"name": str(name)}} if _is_json({"name": name}):
            return dict(value)
    raise ValueError(
        'Input should be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
    )


ToolChoice = Annotated[Any, AfterValidator(_tool_choice)]


def calling(choice: Any, parallel: bool | None, reasoning: ReasoningFormat | None) -> Calling:
    """What there is to call, as a request with the validated `tool_choice` says it."""
    told = Calling(parallel=parallel is not False, reasoning=reasoning != "none")
    if isinstance(choice, dict):
        return replace(told, choice="required", name=choice["function"]["name"])
    return replace(told, choice=choice or "auto")
