"""The pydantic models of messages, tools, cache content and retention. All sources use them: request bodies,
cache files, the configuration, and stored answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from headstart.json_scan import depth, is_deeper
from headstart.limits import MAX_DEPTH, MAX_MESSAGES, MAX_TOOLS

# The arguments of calls are nested some levels deep in a message.
MAX_ARGUMENTS_DEPTH = MAX_DEPTH - 8
# A hundred years.
MAX_TTL = 36525 * 86400
MAX_TEXT = 1000
MAX_PAIRS = 32
MAX_KEY = 64


def _encodable(text: str) -> str:
    # JSON can encode half a surrogate pair, which is not text and can't be tokenised.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("Input should be valid Unicode") from None
    return text


Utf8 = Annotated[str, AfterValidator(_encodable)]
T = TypeVar("T")
# Validation stops at the first wrong item, also where the items belong to another alternative of a union.
Many = Annotated[list[T], Field(fail_fast=True)]


def is_json(value: Any) -> bool:
    """Whether the value can be stored as JSON; half a surrogate pair, NaN and too deep nesting can't."""
    try:
        return depth(value) <= MAX_DEPTH and bool(msgspec.json.decode(msgspec.json.encode(value)) == value)
    except (ValueError, OverflowError, RecursionError):
        return False


def _json(value: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for a value that can't be stored."""
    if depth(value) > MAX_DEPTH:
        raise ValueError(f"Input should be nested at most {MAX_DEPTH} levels deep")
    if not is_json(value):
        raise ValueError("Input should be valid JSON")
    return value


def _function(value: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for a value that is no function or can't be stored."""
    function = value.get("function")
    if value.get("type", "function") != "function" or not isinstance(function, dict):
        raise ValueError('Input should be {"type": "function", "function": {"name": ...}}')
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError("A function needs a name")
    if not isinstance(function.get("parameters", {}), dict | None):
        raise ValueError("A function's parameters are a JSON schema, which is an object")
    return _json(value)


def arguments_of(text: str) -> Any:
    """A call's arguments as the object that templates expect. Returns `text` unchanged if it is no JSON
    object (it may be cut off) or is nested too deeply."""
    try:
        parsed = None if is_deeper(text.encode(), MAX_ARGUMENTS_DEPTH) else msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        return text
    return parsed if isinstance(parsed, dict) else text


def _kept_call(value: dict[str, Any]) -> dict[str, Any]:
    """Parses the arguments: templates expect an object, OpenAI's clients send its JSON text."""
    function = _function(value)["function"]
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return value
    return {**value, "function": {**function, "arguments": arguments_of(arguments)}}


def _call(value: dict[str, Any]) -> dict[str, Any]:
    """As `_kept_call`, for a call in a request: raises ValueError if its arguments are nested too deeply."""
    call = _kept_call(value)
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str) and is_deeper(arguments.encode(), MAX_ARGUMENTS_DEPTH):
        raise ValueError(f"Arguments should be nested at most {MAX_ARGUMENTS_DEPTH} levels deep")
    return call


JsonObject = Annotated[dict[str, Any], AfterValidator(_json)]
Tool = Annotated[dict[str, Any], AfterValidator(_function)]
ToolCall = Annotated[dict[str, Any], AfterValidator(_call)]


class Open(BaseModel):
    """Accepts unknown fields."""

    model_config = ConfigDict(extra="allow")


class TextPart(Open):
    type: Literal["text"] = Field(description="Messages contain text only.")
    text: Utf8 = Field(description="A part of the message's text; parts are joined without separators.")


class ChatMessage(Open):
    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="`developer` is the same as `system`."
    )
    content: Utf8 | Many[TextPart] | None = Field(None, description="The text, or a list of its parts.")
    tool_calls: Many[ToolCall] | None = Field(None, description="The calls made by an assistant message.")
    reasoning_content: Utf8 | None = Field(
        None, description="The reasoning of an assistant message, for templates that include it."
    )
    tool_call_id: Utf8 | None = Field(None, description="The id of the call that a tool message answers.")
    name: Utf8 | None = Field(None, description="The speaker's name, for templates that include it.")

    @model_validator(mode="after")
    def _has_content(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("A message needs content")
        return self

    @model_validator(mode="after")
    def _says_all_in_text(self) -> ChatMessage:
        extra = self.model_extra or {}
        if extra.get("function_call") is not None:
            raise ValueError("function_call is not supported: send tool_calls instead")
        if extra.get("audio") is not None:
            raise ValueError("audio is not supported: send its text as content")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as chat templates expect it: role, text, and the fields for tools that are set."""
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text,
        }
        if self.role == "assistant" and self.tool_calls:
            message["tool_calls"] = self.tool_calls
        if self.role == "assistant" and self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.role == "tool" and self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            message["name"] = self.name
        return message


class KeptMessage(ChatMessage):
    """A message of a cache. `unfinished` (last one only): chats begin with its text and continue it as they
    like."""

    # An answer is stored whatever the model wrote as arguments.
    tool_calls: list[Annotated[dict[str, Any], AfterValidator(_kept_call)]] | None = None
    unfinished: Literal[True] | None = None

    def plain(self) -> dict[str, Any]:
        return super().plain() | ({"unfinished": True} if self.unfinished else {})


class KeptContent(BaseModel):
    """The content of a cache: a prompt, or messages and tools."""

    prompt: Utf8 = ""
    messages: list[KeptMessage] = Field([], max_length=MAX_MESSAGES)
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)

    @model_validator(mode="after")
    def _is_one_of_both(self) -> KeptContent:
        if bool(self.prompt) == bool(self.messages):
            raise ValueError("A cache has either a prompt or messages")
        if self.prompt and self.tools:
            raise ValueError("tools go with messages")
        if any(message.unfinished for message in self.messages[:-1]):
            raise ValueError("Only the last message may be unfinished")
        return self


Ttl = Annotated[float, Field(gt=0, le=MAX_TTL, allow_inf_nan=False)]
Description = Annotated[Utf8, StringConstraints(max_length=MAX_TEXT)]
Key = Annotated[Utf8, StringConstraints(min_length=1, max_length=MAX_KEY)]
Value = Annotated[Utf8, StringConstraints(max_length=MAX_TEXT)]
Metadata = Annotated[dict[Key, Value], Field(max_length=MAX_PAIRS)]


class KeptTerms(BaseModel):
    """The retention of a cache."""

    ttl_seconds: Ttl | None = None
    pinned: bool = False
    description: Description = ""
    metadata: Metadata = {}
