"""Request bodies. Unknown fields are accepted. A known but unsupported parameter is refused, unless its value
has no effect."""

from __future__ import annotations

from typing import Annotated, Any, Self

from msgspec import structs
from pydantic import BaseModel, BeforeValidator, Field, StringConstraints, model_validator

from headstart.api.fields.answer_format import StructuredRequest
from headstart.api.fields.tools import (
    with_modest_calls,
)
from headstart.api.fields.values import LogitBias, Many, Utf8
from headstart.contents import ChatMessage, Open
from headstart.errors import BadRequest
from headstart.limits import MAX_MESSAGES, MAX_UNKNOWN
from headstart.protocol import Sampling
from headstart.service.interface.options import AnswerGrammar, Options

MOST_ANSWERS = 128


StopString = Annotated[Utf8, StringConstraints(min_length=1, max_length=1000)]


Body = Open


class StreamOptions(Body):
    include_usage: bool = Field(False, description="Send `usage` in an additional last chunk.")


class CachedRequest(Body):
    """A request that may start from a cache."""

    model: Utf8 = Field(description="A model, an alias, or `model@cache`.")
    use_cache: Utf8 | Many[Utf8] | None = Field(
        None, description="The name of the cache to start from, or a list of names."
    )

    @model_validator(mode="after")
    def _knows_most_fields(self) -> Self:
        if len(self.model_extra or {}) > MAX_UNKNOWN:
            raise ValueError(f"The body has more than {MAX_UNKNOWN} unknown fields")
        return self

    @property
    def names(self) -> tuple[str, ...] | None:
        """The caches to start from."""
        if isinstance(self.use_cache, list):
            return tuple(self.use_cache)
        return None if self.use_cache is None else (self.use_cache,)


class SampledRequest(CachedRequest):
    """A request that generates tokens."""

    cache_prompt: bool = Field(
        True, description="False: evaluate every prompt token; use no state of caches or slots."
    )
    explain_cache: bool = Field(
        False, description="Return `cache_explanation`: why the request hit or missed a cache."
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0: greedy sampling.")
    top_p: float | None = Field(
        None, ge=0, le=1, description="Sample from the likeliest tokens with this total probability."
    )
    top_k: int | None = Field(
        None, ge=-1, lt=1 << 31, description="Sample from this many likeliest tokens; 0 or -1: all."
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="Minimum probability relative to the likeliest token's."
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Subtracted from the logits of tokens that occurred."
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="Subtracted from a token's logit once per occurrence."
    )
    repeat_penalty: float | None = Field(
        None, gt=0, le=10, description="Divides the logits of tokens that occurred."
    )
    repeat_last_n: int | None = Field(
        None, ge=0, le=4096, description="Number of most recent tokens that penalties consider."
    )
    seed: int | None = Field(
        None,
        ge=-(1 << 63),
        lt=1 << 63,
        description="The same request with the same seed has the same answer. Default: a new seed.",
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = Field(
        None, description="Texts that end the answer; they are not included in it."
    )

    @property
    def sampling(self) -> Sampling:
        """Without logprobs, which each endpoint requests differently."""
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
    """Fields that chat and text completions share."""

    max_tokens: int | None = Field(None, ge=0, description="Maximum number of tokens of an answer.")
    n: int | None = Field(
        None, ge=1, le=MOST_ANSWERS, description="Number of answers, at most the model's number of slots."
    )
    logit_bias: LogitBias | None = Field(
        None, description="Maps token ids to values that are added to their logits."
    )
    ignore_eos: bool | None = Field(None, description="True: the model can't end the answer itself.")
    stream: bool | None = Field(False, description="Send the answer as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    return_progress: bool | None = Field(
        None, description="With `stream`: send `prompt_progress` while the prompt is evaluated."
    )

    def options(
        self, max_tokens: int | None, caches: tuple[str, ...] | None, grammar: AnswerGrammar | None
    ) -> Options:
        """Raises BadRequest for a parameter that can't be honoured."""
        self._check_supported()
        return Options(
            max_tokens=max_tokens,
            sampling=structs.replace(self.sampling, logprobs=self.n_logprobs),
            stop=self.stops,
            use_cache=caches,
            reuse=self.cache_prompt,
            explain=self.explain_cache,
            n=self.n or 1,
            progress=bool(self.stream and self.return_progress),
            grammar=grammar,
            given=given_parameters(self),
        )

    @property
    def n_logprobs(self) -> int | None:
        """Number of likeliest tokens to return with each token; None: no logprobs at all."""
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


# Parameters of the OpenAI API that the server or the endpoint doesn't support, with the values that have no
# effect and are accepted.
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


# Values, besides null, that clients send for a parameter they don't use.
NOTHING: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "min_p": (0.0,),
    "grammar": ("",),
    "ignore_eos": (False,),
}


def given_parameters(body: BaseModel) -> frozenset[str]:
    """Names of parameters set to a value that has an effect, so that an engine lacking one can refuse it."""
    fields = type(body).model_fields
    return frozenset(
        (name in fields and fields[name].alias) or name
        for name in body.model_fields_set
        if _is_given(name, getattr(body, name))
    )


def _is_given(name: str, value: object) -> bool:
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_unset=True)
    # 0 == False, but a number of logprobs is no flag.
    return value is not None and not any(
        value == nothing and type(value) is type(nothing) for nothing in NOTHING.get(name, ())
    )
