"""What all answers have in common in the description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from headstart.caches.entry import MissReason
from headstart.protocol import Source


class Reply(BaseModel):
    """An answer has no other fields than these; those that have a default may be missing."""

    model_config = ConfigDict(extra="forbid")


class ErrorObject(BaseModel):
    """Some errors have more fields, such as `n_prompt_tokens` and `n_ctx`."""

    model_config = ConfigDict(extra="allow")

    message: str = Field(description="What is wrong, and what to change.")
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = Field(description="The field that is wrong.")
    code: str | None


class ErrorReply(Reply):
    error: ErrorObject


class PromptDetails(Reply):
    cached_tokens: int = Field(description="Tokens not evaluated, because their state was there.")


class CacheAccount(Reply):
    """What is told of a named cache beside a usage."""

    cache_hit: bool | None = Field(None, description="Whether the engine started from the cache's state.")
    cached_prompts: list[str] | None = Field(None, description="The caches' names on a hit, else [].")
    cache_miss_reason: MissReason | None = None


class Usage(CacheAccount):
    prompt_tokens: int = Field(description="All of the prompt, the cached ones included.")
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Timings(Reply):
    """As the engine measured them."""

    cache_n: int = Field(description="Prompt tokens not evaluated.")
    cache_source: Source = Field(description="Where their state came from.")
    prefix_match_n: int = Field(description="Prompt tokens that the closest known state begins with.")
    prompt_n: int = Field(description="Prompt tokens evaluated.")
    prompt_ms: float
    predicted_n: int = Field(description="Tokens generated.")
    predicted_ms: float
    queue_ms: float = Field(description="Waiting for a slot.")
    restore_ms: float = Field(description="Reading the state.")
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
    saved_as: str | None = Field(None, description="The name under which the chat is being saved.")
    cache_explanation: CacheExplanation | None = None


class Ending(Reply):
    """The last chunk with a choice has what a whole answer has beside its usage."""

    timings: Timings | None = None
    saved_as: str | None = None
    cache_explanation: CacheExplanation | None = None


@dataclass(frozen=True)
class Answer:
    """`whole`: the JSON of a reply; None for a file. `event`: that of one event, where it may be streamed.
    `done`: the data of an event that closes every stream."""

    whole: type[BaseModel] | None
    event: type[BaseModel] | None = None
    done: str | None = "[DONE]"
    error: type[BaseModel] = ErrorReply
