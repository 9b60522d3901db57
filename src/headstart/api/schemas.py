"""Request bodies. Unknown fields are accepted; those that would change the answer in a way this server can't
are refused unless they ask for nothing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from headstart.caches.entry import FORMS, Form
from headstart.errors import BadRequest
from headstart.messages import Sampling
from headstart.service.generation import Options

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
    use_cache: Utf8 | None = Field(None, description="Name of the cache to start from.")
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
            use_cache=self.use_cache,
            reuse=self.cache_prompt,
            explain=self.explain_cache,
        )

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
}


class TextPart(Body):
    type: Literal["text"]
    text: Utf8


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Utf8 | list[TextPart]

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates want them."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0, description="Overrides `max_tokens`.")


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
    prompt: Utf8 = Field(description="The system prompt in chats; the leading text in completions.")
    forms: list[Form] = Field(
        list(FORMS), alias="for", min_length=1, description="What the cache is for: chat, completion or both."
    )
    allow_overwrite: bool = Field(True, description="False: 409 when there is one of this name.")
    stream: bool = Field(False, description="Report progress as server-sent events.")
