"""What a text completion asks for beside what it has in common with a chat."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import Field

from headstart.api.schemas import MOST_ANSWERS, GenerationRequest
from headstart.api.text import Many, Utf8
from headstart.api.token_fields import LegacyLogprobs, TokenId
from headstart.errors import BadRequest
from headstart.service.interface.options import Options
from headstart.service.interface.text import Text

COMPLETION_MAX_TOKENS = 16
MOST_PROMPTS = 128
T = TypeVar("T")
Prompts = Annotated[Many[T], Field(max_length=MOST_PROMPTS)]


class CompletionRequest(GenerationRequest):
    prompt: Utf8 | Prompts[Utf8] | Many[TokenId] | Prompts[Many[TokenId]] = Field(
        description="A text or its token ids, or a list of such, each of which gets its own choices."
    )
    suffix: Utf8 | None = Field(
        None, description="What comes after the answer, for models that can fill in a gap."
    )
    echo: bool | None = Field(None, description="Begin each answer with the prompt, as it was sent.")
    logprobs: LegacyLogprobs = Field(
        None, description="Tell logarithms of probabilities: each token's and so many of the likeliest."
    )
    best_of: int | None = Field(
        None, ge=1, le=MOST_ANSWERS, description="1 or the same as `n`: answers are not chosen among."
    )

    def options(self, max_tokens: int | None) -> Options:
        if self.best_of not in (None, 1, self.n):
            raise BadRequest(
                f"best_of = {self.best_of} is not supported by this server: ask for n answers and choose.",
                param="best_of",
            )
        if self.echo and self.logprobs is not None:
            raise BadRequest(
                "The prompt's tokens have no logprobs: leave echo out, or logprobs.", param="echo"
            )
        return super().options(max_tokens)

    @property
    def n_logprobs(self) -> int | None:
        return self.logprobs

    def texts(self) -> list[Text]:
        """What is to be continued. Raises BadRequest for nothing, unless it continues a cache."""
        texts = [_text(prompt, self.suffix) for prompt in self._prompts()]
        if len(texts) > MOST_PROMPTS:
            raise BadRequest(f"{len(texts)} prompts; {MOST_PROMPTS} is the most.", param="prompt")
        if not texts or (self.use_cache is None and any(text.is_empty for text in texts)):
            raise BadRequest("The prompt is empty.", param="prompt")
        return texts

    def _prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        return [prompt] if is_one else list(prompt)


def _text(prompt: str | list[int], suffix: str | None) -> Text:
    return Text(prompt, suffix=suffix or "") if isinstance(prompt, str) else Text("", prompt, suffix or "")
