"""Requests of the service to a model's prompt process: tokens of chats and texts, and rendered chats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from headstart.errors import TextTooLong
from headstart.prompt.chat import MOST_CHARACTERS
from headstart.prompt.process.client import PromptClient
from headstart.prompt.process.protocol import (
    ChatPrefix,
    ChatPrompt,
    Plain,
    Render,
    Rendered,
    TextPrefix,
    Tokenisable,
    Tokenise,
    Tokens,
)

Json = dict[str, Any]

# Maximum characters of the texts tokenised in one turn, unless one text alone has more.
TURN_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class PromptRequests:
    """The prompts of one model for one owner; owners take turns. `can_cut`: a state may be used in part. All
    methods raise BadRequest for a prompt that can't be rendered or is too long, and Unavailable."""

    client: PromptClient
    owner: str
    can_cut: bool

    async def tokens(self, *items: Tokenisable) -> list[list[int]]:
        """The tokens of each, in one turn."""
        return (await self._tokenise(Tokenise(list(items), self.can_cut))).lists

    async def with_prefix(
        self, item: Tokenisable, prefix: ChatPrefix | TextPrefix
    ) -> tuple[list[int], list[int] | None]:
        """The tokens, and those of the `prefix`; None if the template refuses it."""
        reply = await self._tokenise(Tokenise([item], self.can_cut, prefix))
        return reply.lists[0], reply.prefix

    async def _tokenise(self, request: Tokenise) -> Tokens:
        _check_length(request.items)
        reply = await self.client.ask(self.owner, request)
        assert isinstance(reply, Tokens)
        return reply

    async def one(self, item: Tokenisable) -> list[int]:
        (tokens,) = await self.tokens(item)
        return tokens

    async def plain(
        self, texts: Sequence[str], *, first: bool = True, special: bool = True
    ) -> list[list[int]]:
        """The tokens of each text by itself, split into turns so that other owners don't wait long."""
        tokens: list[list[int]] = []
        for part in _parts(texts):
            tokens += await self.tokens(*(Plain(text, first, special) for text in part))
        return tokens

    async def rendered(self, messages: list[Json], tools: list[Json]) -> str:
        reply = await self.client.ask(self.owner, Render(messages, tools))
        assert isinstance(reply, Rendered)
        return reply.text


def _parts(texts: Sequence[str]) -> Iterable[list[str]]:
    part: list[str] = []
    n_characters = 0
    for text in texts:
        if part and n_characters + len(text) > TURN_CHARACTERS:
            yield part
            part, n_characters = [], 0
        part.append(text)
        n_characters += len(text)
    if part:
        yield part


def _check_length(items: Iterable[Tokenisable]) -> None:
    """Raises TextTooLong."""
    for each in items:
        if isinstance(each, ChatPrompt | ChatPrefix):
            texts = [message.get("content") for message in each.messages]
            n, param = sum(len(text) for text in texts if isinstance(text, str)), "messages"
        else:
            n, param = len(each.text), "prompt"
        if n > MOST_CHARACTERS:
            raise TextTooLong(
                f"{n} characters are more than any context holds; {MOST_CHARACTERS} are the most.",
                param=param,
            )
