"""Schemas that the descriptions of several answers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from headstart.caches.entry import MissReason
from headstart.protocol import Source


class Reply(BaseModel):
    """An answer has no other fields. Fields with a default may be missing."""

    model_config = ConfigDict(extra="forbid")


class ErrorObject(BaseModel):
    """Some errors have more fields, such as `n_prompt_tokens` and `n_ctx`."""

    model_config = ConfigDict(extra="allow")

    message: str = Field(description="The problem, and how to fix it.")
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = Field(description="The invalid field, if any.")
    code: str | None


class ErrorReply(Reply):
    error: ErrorObject


class PromptDetails(Reply):
    cached_tokens: int = Field(description="Tokens not evaluated, because their state was available.")


class CacheAccount(Reply):
    """Fields of `usage` about the named cache."""

    cache_hit: bool | None = Field(
        None, description="Whether the engine took at least half of the cache's tokens from its state."
    )
    cached_prompts: list[str] | None = Field(None, description="The names of the caches on a hit, else [].")
    cache_miss_reason: MissReason | None = None


class Usage(CacheAccount):
    prompt_tokens: int = Field(description="All prompt tokens, including cached ones.")
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Timings(Reply):
    """Measured by the engine."""

    cache_n: int = Field(description="Prompt tokens not evaluated.")
    cache_source: Source = Field(description="The source of their state.")
    prefix_match_n: int = Field(
        description="Length in tokens of the prefix that the prompt shares with the closest known state."
    )
    prompt_n: int = Field(description="Prompt tokens evaluated.")
    prompt_ms: float
    predicted_n: int = Field(description="Tokens generated.")
    predicted_ms: float
    queue_ms: float = Field(description="Time waiting for a slot.")
    restore_ms: float = Field(description="Time restoring the state.")
    ttft_ms: float = Field(description="From the engine's receipt of the request to the first token.")


class CacheExplanation(Reply):
    closest_cache: str | None
    matched_tokens: int
    cache_tokens: int
    prompt_tokens: int
    first_difference: int | None
    text_before: str
    cache_text: str
    prompt_text: str
    reason: str


class Account(Reply):
    timings: Timings
    saved_as: str | None = Field(None, description="The name under which the chat is being saved as a cache.")
    cache_explanation: CacheExplanation | None = None


class Ending(Reply):
    """The last chunk with a choice has these fields of a complete answer."""

    timings: Timings | None = None
    saved_as: str | None = None
    cache_explanation: CacheExplanation | None = None


@dataclass(frozen=True)
class Answer:
    """Schemas of a route's answers. `whole`: a JSON reply; None for a file or, with
    `text`, a plain text. `event`: one event, if the route
    can stream. `done`: the data of the event that closes every stream."""

    whole: type[BaseModel] | None
    event: type[BaseModel] | None = None
    done: str | None = "[DONE]"
    text: bool = False
    error: type[BaseModel] = ErrorReply
