"""Tools and reasoning in request bodies: definitions in OpenAI's format, calls in earlier turns, and the
choice of calls in the answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from headstart.api.fields.values import Many
from headstart.contents import JsonObject, Tool, ToolCall, is_json
from headstart.limits import MAX_TOOLS, MAX_VALUES
from headstart.service.interface.options import Calling

__all__ = [
    "JsonObject",
    "ReasoningFormat",
    "TemplateVariables",
    "Tool",
    "ToolCall",
    "ToolChoice",
    "Tools",
    "calling",
]


def check_arguments(texts: Iterable[str]) -> None:
    """Raises ValueError if the arguments of all calls together have too many values, since each is parsed."""
    n = 0
    for text in texts:
        n += text.count("[") + text.count("{") + text.count(",")
        if n > MAX_VALUES:
            raise ValueError(f"The arguments of all calls have more than {MAX_VALUES} values")


def with_modest_calls(messages: Any) -> Any:
    """Runs before validation, so `messages` may be anything. Raises ValueError."""
    calls = (
        call
        for message in (messages if isinstance(messages, list) else [])
        if isinstance(message, dict) and isinstance(message.get("tool_calls"), list)
        for call in message["tool_calls"]
    )
    functions = (call.get("function") for call in calls if isinstance(call, dict))
    texts = (function.get("arguments") for function in functions if isinstance(function, dict))
    check_arguments(text for text in texts if isinstance(text, str))
    return messages


Tools = Annotated[Many[Tool], Field(max_length=MAX_TOOLS)]
ReasoningFormat = Literal["none", "auto", "deepseek"]


def _plain(variables: dict[str, Any]) -> dict[str, Any]:
    if not all(isinstance(value, str | int | float | None) for value in variables.values()):
        raise ValueError("Values should be texts, numbers, true, false or null")
    if not is_json(variables):
        raise ValueError("Input should be valid JSON")
    return variables


TemplateVariables = Annotated[dict[str, Any], AfterValidator(_plain)]


def _tool_choice(value: Any) -> str | dict[str, Any]:
    """A keyword, or OpenAI's object that names a function. Raises ValueError for anything else."""
    match value:
        case "none" | "auto" | "required":
            return str(value)
        case {"type": "function", "function": {"name": str(name)}} if is_json({"name": name}):
            return dict(value)
    raise ValueError(
        'Input should be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
    )


ToolChoice = Annotated[Any, AfterValidator(_tool_choice)]


def calling(choice: Any, parallel: bool | None, reasoning: ReasoningFormat | None) -> Calling:
    """The choice of calls from a request's fields. `choice`: a validated `tool_choice`."""
    unforced = Calling(parallel=parallel is not False, reasoning=reasoning != "none")
    if isinstance(choice, dict):
        return replace(unforced, choice="required", name=choice["function"]["name"])
    return replace(unforced, choice=choice or "auto")
