"""Request bodies. Unknown fields are accepted; those that would change the answer in a way this server can't
are refused unless they ask for nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Self

from msgspec import structs
from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from headstart.api.asked import asked
from headstart.api.structure import StructuredRequest
from headstart.api.text import Many, Utf8
from headstart.api.token_fields import LogitBias, TopLogprobs
from headstart.api.tools import (
    ReasoningFormat,
    TemplateVariables,
    ToolChoice,
    Tools,
    calling,
    with_modest_calls,
)
from headstart.contents import ChatMessage, Open
from headstart.errors import BadRequest
from headstart.limits import MAX_MESSAGES, MAX_UNKNOWN
from headstart.protocol import Sampling
from headstart.service.interface.options import Options

MOST_ANSWERS = 128


StopString = Annotated[Utf8, StringConstraints(min_length=1, max_length=1000)]


Body = Open


class StreamOptions(Body):
    include_usage: bool = Field(False, description="Send a last chunk with `usage`.")


class CachedRequest(Body):
    """What begins like a cache."""

    model: Utf8 = Field(description="A model, an alias, or `model@cache`.")
    use_cache: Utf8 | Many[Utf8] | None = Field(
        None, description="Name of the cache to start from, or several names."
    )

    @model_validator(mode="after")
    def _knows_most_fields(self) -> Self:
        if len(self.model_extra or {}) > MAX_UNKNOWN:
            raise ValueError(f"The body has more than {MAX_UNKNOWN} fields that are not known here")
        return self

    @property
    def names(self) -> tuple[str, ...] | None:
        """The caches to start from."""
        if isinstance(self.use_cache, list):
            return tuple(self.use_cache)
        return None if self.use_cache is None else (self.use_cache,)


class SampledRequest(CachedRequest):
    """What is answered by sampling."""

    cache_prompt: bool = Field(
        True, description="False: evaluate every prompt token, taking nothing from caches or slots."
    )
    explain_cache: bool = Field(False, description="Tell why the request started from a cache, or didn't.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(None, ge=0, le=1, description="Likeliest tokens with so much probability.")
    top_k: int | None = Field(None, ge=-1, lt=1 << 31, description="So many likeliest tokens; 0 or -1: all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Tokens so likely against the likeliest.")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="For tokens that came already.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="As often as tokens came.")
    repeat_penalty: float | None = Field(None, gt=0, le=10, description="Divides logits of such tokens.")
    repeat_last_n: int | None = Field(None, ge=0, le=4096, description="Tokens that penalties look at.")
    seed: int | None = Field(
        None, ge=-(1 << 63), lt=1 << 63, description="The same seed makes the same answer; else a new one."
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = Field(
        None, description="Texts that end an answer and are no part of it."
    )

    @property
    def sampling(self) -> Sampling:
        """But for logprobs, which each endpoint asks for in its own way."""
        given = {
            name: value
            for name in Sampling.__struct_fields__
            if name in type(self).model_fields and (value := getattr(self, name)) is not None
        }
        return Sampling(**given | {"logprobs": None})

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class GenerationRequest(SampledRequest, StructuredRequest):
    """What chat and text completions have in common."""

    max_tokens: int | None = Field(None, ge=0, description="The most tokens that an answer may have.")
    n: int | None = Field(
        None, ge=1, le=MOST_ANSWERS, description="How many answers; no more than the model has slots."
    )
    logit_bias: LogitBias | None = Field(None, description="By token id: what is added to its logit.")
    ignore_eos: bool | None = Field(None, description="True: the model can't end its answer by itself.")
    stream: bool | None = Field(False, description="Send the answer as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="With `stream` only.")

    def options(self, max_tokens: int | None) -> Options:
        """Raises BadRequest for a parameter that can't be honoured."""
        self._check_supported()
        return Options(
            max_tokens=max_tokens,
            sampling=structs.replace(self.sampling, logprobs=self.n_logprobs),
            stop=self.stops,
            use_cache=self.names,
            reuse=self.cache_prompt,
            explain=self.explain_cache,
            n=self.n or 1,
            given=asked(self),
        )

    @property
    def n_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told with each; None: not even its own probability."""
        return None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _check_supported(self) -> None:
        extra: dict[str, Any] = self.model_extra or {}
        for name, harmless in HARMLESS.items():
            if name in extra and extra[name] not in harmless:
                instead = INSTEAD.get(name, "leave it out")
                raise BadRequest(
                    f"{name} = {extra[name]!r} is not supported by this server; {instead}.", param=name
                )


# Parameters of the OpenAI API that this server, or the endpoint, doesn't have, with the values that ask for
# nothing.
HARMLESS: dict[str, tuple[object, ...]] = {
    "best_of": (None, 1),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "json_schema": (None, {}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "web_search_options": (None,),
    "moderation": (None,),
    "save_as": (None,),
}
INSTEAD = {"functions": "send tools instead", "function_call": "send tools and tool_choice instead"}


Messages = Annotated[Many[ChatMessage], Field(max_length=MAX_MESSAGES), BeforeValidator(with_modest_calls)]


class ChatRequest(GenerationRequest):
    messages: Messages = Field(
        min_length=1, description="The chat so far; a last message of the assistant's is continued."
    )
    tools: Tools | None = Field(None, description="Functions that the model may call.")
    tool_choice: ToolChoice | None = Field(
        None, description="Whether and which tools are called: none, auto, required, or one by its name."
    )
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call.")
    reasoning_format: ReasoningFormat | None = Field(
        None, description="none: what the model thinks first is left in its text."
    )
    chat_template_kwargs: TemplateVariables | None = Field(
        None, description="What the template is told besides, such as `enable_thinking`."
    )
    max_completion_tokens: int | None = Field(None, ge=0, description="Overrides `max_tokens`.")
    logprobs: bool | None = Field(None, description="Tell the logarithm of each token's probability.")
    top_logprobs: TopLogprobs | None = Field(
        None, description="With `logprobs`: tell so many of the likeliest tokens, too."
    )
    continue_final_message: bool | None = Field(
        None, description="Whether the answer continues the last message; only an assistant's is."
    )
    add_generation_prompt: bool | None = Field(
        None, description="False: the answer continues the last message, which must be the assistant's."
    )
    save_as: Utf8 | None = Field(None, description="Name under which to keep the chat with its answer.")
    allow_overwrite: bool | None = Field(
        None, description="Whether `save_as` may replace a cache; by default only a saved chat."
    )

    def options(self, max_tokens: int | None) -> Options:
        self._check_end()
        return replace(
            super().options(max_tokens),
            save_as=self.save_as,
            overwrite=self.allow_overwrite,
            calling=calling(self.tool_choice, self.parallel_tool_calls, self.reasoning_format),
            variables=self.chat_template_kwargs or {},
        )

    def _check_end(self) -> None:
        """Raises BadRequest where the messages don't end as they are said to."""
        last = self.messages[-1]
        continues = last.role == "assistant" and not last.tool_calls
        if self.continue_final_message not in (None, continues):
            end = "the user's" if continues else "the assistant's"
            asked = str(self.continue_final_message).lower()
            raise BadRequest(
                f"continue_final_message = {asked} needs a last message of {end}.",
                param="continue_final_message",
            )
        if self.add_generation_prompt is False and not continues:
            raise BadRequest(
                "add_generation_prompt = false needs a last message of the assistant's.",
                param="add_generation_prompt",
            )

    @property
    def n_logprobs(self) -> int | None:
        """Raises BadRequest for likeliest tokens without logprobs."""
        if self.top_logprobs and not self.logprobs:
            raise BadRequest('top_logprobs needs "logprobs": true.', param="top_logprobs")
        return self.top_logprobs or 0 if self.logprobs else None
