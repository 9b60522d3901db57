"""Answers of /v1/messages."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from headstart.api.fields.reply import Account, Answer, CacheAccount, Reply


class AnswerText(Reply):
    type: Literal["text"]
    text: str


class AnswerThinking(Reply):
    type: Literal["thinking"]
    thinking: str
    signature: str


class AnswerToolUse(Reply):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class CacheCreation(Reply):
    ephemeral_5m_input_tokens: int
    ephemeral_1h_input_tokens: int


class MessageUsage(CacheAccount):
    input_tokens: int = Field(description="Tokens computed and not stored.")
    cache_creation_input_tokens: int = Field(
        description="Tokens computed and being stored, up to a breakpoint."
    )
    cache_read_input_tokens: int = Field(
        description="Tokens not computed, because a cache or slot had their state."
    )
    cache_creation: CacheCreation
    output_tokens: int


class Message(Account):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerText | AnswerThinking | AnswerToolUse]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(Reply):
    """The event's name equals its `type`. A stream runs from `message_start` to `message_stop`."""

    model_config = ConfigDict(extra="allow")

    type: str


class TokenCount(Reply):
    input_tokens: int


class AnthropicError(Reply):
    type: str
    message: str


class AnthropicErrorReply(Reply):
    type: Literal["error"]
    error: AnthropicError
    request_id: str | None


# Keyed by method and path.
ANSWERS = {
    ("post", "/v1/messages"): Answer(Message, MessageEvent, done=None, error=AnthropicErrorReply),
    ("post", "/v1/messages/count_tokens"): Answer(TokenCount, error=AnthropicErrorReply),
}
