"""Answers of /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from headstart.api.fields.reply import Account, Answer, Ending, Reply, Usage

FinishReason = Literal["stop", "length", "tool_calls"]


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    content: list[TokenLogprob]
    refusal: None


class CalledFunction(Reply):
    name: str
    arguments: str = Field(description="JSON, unless the answer was cut off.")


class ToolCall(Reply):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Reply):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Reply):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Account):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(Reply):
    name: str | None = None
    arguments: str


class ToolCallDelta(Reply):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class PromptProgress(Reply):
    """The progress of prefill. The done part of its work is `(processed - cache) / (total - cache)`."""

    total: int = Field(description="All prompt tokens.")
    cache: int = Field(description="Tokens not evaluated, because their state was available.")
    processed: int = Field(description="Tokens evaluated so far, and those of `cache`.")
    time_ms: int = Field(description="Milliseconds since prefill began.")


class ProgressingChunk(Ending):
    """A chunk has `prompt_progress` if the request has `return_progress`, and before the first token only."""

    prompt_progress: PromptProgress | None = None


class Delta(Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(Reply):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(ProgressingChunk):
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Logprobs(Reply):
    """OpenAI's legacy format. `top_logprobs` always include the token itself."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Reply):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason | None = Field(
        description="In a stream null, except in the last chunk of the choice."
    )


class TextCompletion(Account):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class TextChunk(ProgressingChunk):
    """One event of a streamed completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


# Keyed by method and path.
ANSWERS = {
    ("post", "/v1/chat/completions"): Answer(ChatCompletion, ChatChunk),
    ("post", "/v1/completions"): Answer(TextCompletion, TextChunk),
}
