"""Answers of /v1/responses. Events are described in outline; OpenAI's reference describes each of them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from headstart.api.fields.reply import Account, Answer, CacheAccount, PromptDetails, Reply

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(Reply):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class ReasoningText(Reply):
    type: Literal["reasoning_text"]
    text: str


class OutputMessage(Reply):
    id: str
    type: Literal["message"]
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoning(Reply):
    id: str
    type: Literal["reasoning"]
    status: Status
    summary: list[Any]
    content: list[ReasoningText]


class OutputCall(Reply):
    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str


class OutputDetails(Reply):
    reasoning_tokens: int


class ResponseUsage(CacheAccount):
    input_tokens: int
    input_tokens_details: PromptDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseError(Reply):
    code: str
    message: str


class Incomplete(Reply):
    reason: Literal["max_output_tokens"]


class Response(Account):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None = None
    status: Status
    background: Literal[False]
    error: ResponseError | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None
    output: list[OutputMessage | OutputReasoning | OutputCall]
    usage: ResponseUsage | None


class ResponseEvent(Reply):
    """The event's name equals its `type`. The last event contains the whole response."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int = Field(description="Number of the event, from 0.")


class ResponseDeleted(Reply):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


# Keyed by method and path.
ANSWERS = {
    ("post", "/v1/responses"): Answer(Response, ResponseEvent, done=None),
    ("get", "/v1/responses/{response_id}"): Answer(Response),
    ("delete", "/v1/responses/{response_id}"): Answer(ResponseDeleted),
}
