"""A chat as the model gets it: messages, the tools it may call, and a cached opening before both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from headstart.caches.entry import Content, Entry
from headstart.prompt.prompts import UNFINISHED, Prompts, soon


@dataclass(frozen=True)
class Chat:
    """`messages` and `tools` as templates take them."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]

    def after(self, cached: Content) -> Chat:
        """The cached opening and then this chat. What the chat repeats of the opening, all of it or its first
        system messages, is not said twice. Without tools of its own it has the cache's."""
        opening = cached.opening
        own = self.messages[_repeated(opening, self.messages) :]
        # Tools that are equal may be written in another order, which would be another prompt.
        others = self.tools and self.tools != cached.tools
        return Chat([*opening, *own], self.tools if others else cached.tools)

    def answered(self, text: str) -> Chat:
        return Chat([*self.messages, {"role": "assistant", "content": text}], self.tools)

    async def tokens(self, prompts: Prompts) -> list[int]:
        """Raises BadRequest when the template refuses it."""
        return await soon(lambda most: prompts.chat(self.messages, most, self.tools))

    def opening(self, known: Iterable[Entry]) -> Content:
        """Its longest opening that a cache would hold: that of one of the `known` caches, or its first system
        messages."""
        held = (entry.messages for entry in known if self._begins_with(entry))
        return Content(messages=max([_system(self.messages), *held], key=_length), tools=self.tools)

    def up_to(self, n_messages: int, n_characters: int) -> Content:
        """Its first messages, of the last of them the first characters."""
        *whole, last = self.messages[:n_messages]
        if n_characters < len(last["content"]):
            last = {**last, "content": last["content"][:n_characters], UNFINISHED: True}
        return Content(messages=[*whole, last], tools=self.tools)

    def _begins_with(self, entry: Entry) -> bool:
        n = len(entry.messages)
        if not 0 < n <= len(self.messages) or self.tools != entry.tools:
            return False
        return self.messages[: n - 1] == entry.messages[:-1] and _begins(
            self.messages[n - 1], entry.messages[-1]
        )


def _system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return list(takewhile(lambda message: message["role"] == "system", messages))


def _begins(message: dict[str, Any], opening: dict[str, Any]) -> bool:
    if not opening.get(UNFINISHED):
        return message == opening
    same_role = message["role"] == opening["role"]
    return same_role and bool(message["content"].startswith(opening["content"]))


def _length(messages: Sequence[dict[str, Any]]) -> tuple[int, bool, int]:
    """By which the longer of two openings of a chat is told."""
    if not messages:
        return 0, True, 0
    return len(messages), not messages[-1].get(UNFINISHED), len(messages[-1]["content"])


def _repeated(opening: list[dict[str, Any]], messages: list[dict[str, Any]]) -> int:
    """How many of the first `messages` are those of the opening."""
    if messages[: len(opening)] == opening:
        return len(opening)
    pairs = zip(_system(opening), messages, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
