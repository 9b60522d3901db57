"""Request bodies. Unknown fields are accepted; those that would change the answer in a way this server can't
are refused unless they ask for nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from headstart.api.asked import asked
from headstart.api.tools import Tool, ToolCall
from headstart.caches.entry import FORMS, Content, Form
from headstart.errors import BadRequest
from headstart.messages import Sampling
from headstart.service.preparation import Options

COMPLETION_MAX_TOKENS = 16


def _encodable(text: str) -> str:
    # JSON can write half a surrogate pair, which is no text and can't be tokenised.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("Input should be valid Unicode") from None
    return text


Utf8 = Annotated[str, AfterValidator(_encodable)]
StopString = Annotated[Utf8, StringConstraints(min_length=1, max_length=1000)]


class Body(BaseModel):
    model_config = ConfigDict(extra="allow")


class StreamOptions(Body):
    include_usage: bool = Field(False, description="Send a last chunk with `usage`.")


class GenerationRequest(Body):
    """What chat and text completions have in common."""

    model: Utf8
    use_cache: Utf8 | list[Utf8] | None = Field(
        None, description="Name of the cache to start from, or several names."
    )
    cache_prompt: bool = Field(
        True, description="False: evaluate every prompt token, taking nothing from caches or slots."
    )
    explain_cache: bool = Field(False, description="Tell why the request started from a cache, or didn't.")
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    repeat_last_n: int | None = Field(None, ge=0, le=4096)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    def options(self, max_tokens: int | None) -> Options:
        """Raises BadRequest for a parameter that can't be honoured."""
        self._check_supported()
        given = {
            name: value for name in Sampling.__struct_fields__ if (value := getattr(self, name)) is not None
        }
        return Options(
            max_tokens=max_tokens,
            sampling=Sampling(**given),
            stop=[self.stop] if isinstance(self.stop, str) else self.stop or [],
            use_cache=self.names,
            reuse=self.cache_prompt,
            explain=self.explain_cache,
            given=asked(self),
        )

    @property
    def names(self) -> tuple[str, ...] | None:
        """The caches to start from."""
        if isinstance(self.use_cache, list):
            return tuple(self.use_cache)
        return None if self.use_cache is None else (self.use_cache,)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _check_supported(self) -> None:
        extra: dict[str, Any] = self.model_extra or {}
        for name, harmless in HARMLESS.items():
            if name in extra and extra[name] not in harmless:
                raise BadRequest(
                    f"{name} = {extra[name]!r} is not supported by this server; leave it out.", param=name
                )


# Parameters of the OpenAI API that this server doesn't have, with the values that ask for nothing.
HARMLESS: dict[str, tuple[object, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "echo": (None, False),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "save_as": (None,),
}


class TextPart(Body):
    type: Literal["text"]
    text: Utf8


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Utf8 | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Utf8 | None = None
    name: Utf8 | None = None

    @model_validator(mode="after")
    def _has_content(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("A message needs content")
        return self

    def plain(self) -> dict[str, Any]:
        """Role and text, as chat templates want them, and what there is to say about tools."""
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text,
        }
        if self.role == "assistant" and self.tool_calls:
            message["tool_calls"] = self.tool_calls
        if self.role == "tool":
            message |= {k: v for k in ("tool_call_id", "name") if (v := getattr(self, k)) is not None}
        return message


class ChatRequest(GenerationRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[Tool] | None = Field(None, description="Functions that the model may call.")
    max_completion_tokens: int | None = Field(None, ge=0, description="Overrides `max_tokens`.")
    save_as: Utf8 | None = Field(None, description="Name under which to keep the chat with its answer.")
    allow_overwrite: bool | None = Field(
        None, description="Whether `save_as` may replace a cache; by default only a saved chat."
    )

    def options(self, max_tokens: int | None) -> Options:
        return replace(super().options(max_tokens), save_as=self.save_as, overwrite=self.allow_overwrite)


class CompletionRequest(GenerationRequest):
    prompt: Utf8 | list[Utf8] = Field(description="One text, or a list with one.")

    def text(self) -> str:
        """Raises BadRequest for anything but one text, or an empty one that continues nothing."""
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if len(texts) != 1:
            raise BadRequest("This server takes one prompt a request.", param="prompt")
        if not texts[0] and self.use_cache is None:
            raise BadRequest("The prompt is empty.", param="prompt")
        return texts[0]


class CacheRequest(Body):
    model_config = ConfigDict(extra="allow", populate_by_name=True)

    cache_name: Utf8
    prompt: Utf8 | None = Field(
        None, description="The system prompt in chats; the leading text in completions."
    )
    messages: list[ChatMessage] | None = Field(
        None, min_length=1, description="Instead of a prompt: what chats begin with."
    )
    tools: list[Tool] | None = Field(None, description="With messages: functions the model may call.")
    forms: list[Form] = Field(
        list(FORMS), alias="for", min_length=1, description="What the cache is for: chat, completion or both."
    )
    allow_overwrite: bool = Field(True, description="False: 409 when there is one of this name.")
    stream: bool = Field(False, description="Report progress as server-sent events.")

    def content(self) -> Content:
        """Raises BadRequest unless there is a prompt or there are messages."""
        if self.messages is None:
            if self.prompt is None:
                raise BadRequest("A cache needs a prompt or messages.", param="prompt")
            if self.tools:
                raise BadRequest(
                    "tools go with messages; send the prompt as the first of them.", param="tools"
                )
            return Content(self.prompt)
        if self.prompt is not None:
            raise BadRequest("A cache has either a prompt or messages.", param="messages")
        return Content(messages=[message.plain() for message in self.messages], tools=self.tools or [])

    def wanted(self) -> tuple[Form, ...]:
        """The forms asked for. Raises BadRequest for those that messages don't have."""
        if self.messages is None:
            return tuple(dict.fromkeys(self.forms))
        if "forms" in self.model_fields_set and "completion" in self.forms:
            raise BadRequest(
                "Messages are for chats only: leave completion out, or send a prompt.", param="for"
            )
        return ("chat",)
