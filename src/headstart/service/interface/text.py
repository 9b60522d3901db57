"""Prompts of completions: texts, token ids, and gaps in texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headstart.errors import BadRequest
from headstart.prompt.process import protocol
from headstart.prompt.process.requests import PromptRequests
from headstart.prompt.vocabulary import Vocabulary


@dataclass(frozen=True)
class Text:
    """A prompt: `tokens`, if given, instead of `text`. `suffix` is the text after the answer."""

    text: str
    tokens: Sequence[int] | None = None
    suffix: str = ""

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.tokens or self.suffix)

    def as_text(self, vocabulary: Vocabulary) -> str:
        """The prompt as it was sent, as text; token ids are detokenised."""
        if self.tokens is None:
            return self.text
        return b"".join(map(vocabulary.written, self.tokens)).decode(errors="replace")

    def whole(self, vocabulary: Vocabulary, cached: str = "") -> str:
        """The whole prompt as text, after the cached text. A gap in a text is written with the model's
        fill-in-the-middle tokens. Raises BadRequest if the model has none."""
        as_text = cached + self.as_text(vocabulary)
        if not self.suffix:
            return as_text.removeprefix(vocabulary.bos_text) if self.tokens else as_text
        if vocabulary.gap is None:
            raise BadRequest(
                "The model has no tokens for filling a gap: leave suffix out, or use a model for code that "
                "has them.",
                param="suffix",
            )
        before, after, between = vocabulary.gap
        return f"{before}{as_text.removeprefix(before)}{after}{self.suffix}{between}"

    async def read(self, prompts: PromptRequests, cached: str = "") -> list[int]:
        """The tokens of the whole prompt, including the cached text. Raises BadRequest."""
        if self.tokens is None:
            whole = self.whole(prompts.client.vocabulary, cached)
            return await prompts.one(protocol.TextPrompt(whole))
        if self.suffix:
            raise BadRequest("suffix goes with a prompt that is a text, not token ids.", param="suffix")
        check_tokens(prompts.client.vocabulary, self.tokens, param="prompt")
        prefix = await prompts.one(protocol.TextPrompt(cached)) if cached else []
        return [*prefix, *self.tokens]


def check_tokens(vocabulary: Vocabulary, tokens: Sequence[int], *, param: str) -> None:
    """Raises BadRequest for a token id that the model doesn't have."""
    if unknown := [token for token in tokens if not 0 <= token < vocabulary.n_vocab]:
        raise BadRequest(
            f"The model has no token {unknown[0]}: its tokens are 0 to {vocabulary.n_vocab - 1}.",
            param=param,
        )
