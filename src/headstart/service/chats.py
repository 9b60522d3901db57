"""A chat as the model gets it: messages, the tools it may call, and a cached opening before both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from headstart.caches.entry import Content, Entry
from headstart.prompt.prompts import Prompts, soon
from headstart.prompt.template import Variables, is_open


@dataclass(frozen=True)
class Chat:
    """`messages` and `tools` as templates take them. `variables`: what else a template is told, which makes
    no difference to openings."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    variables: Variables = field(default_factory=dict)

    def after(self, cached: Content) -> Chat:
        """The cached opening and then this chat. What the chat repeats of the opening, all of it or its first
        system messages, is not said twice. Without tools of its own it has the cache's."""
        opening = cached.opening
        own = self.messages[_repeated(opening, self.messages) :]
        # Tools that are equal may be written in another order, which would be another prompt.
        others = self.tools and self.tools != cached.tools
        return replace(self, messages=[*opening, *own], tools=self.tools if others else cached.tools)

    def answered(self, text: str) -> Chat:
        """With the answer, which may continue the last message."""
        if is_open(self.messages):
            *before, last = self.messages
            return replace(self, messages=[*before, {**last, "content": last["content"] + text}])
        return replace(self, messages=[*self.messages, {"role": "assistant", "content": text}])

    async def tokens(self, prompts: Prompts) -> list[int]:
        """Raises BadRequest when the template refuses it."""
        return await soon(lambda most: prompts.chat(self.messages, most, self.tools, self.variables))

    def opening(self, known: Iterable[Entry]) -> Content:
        """Its longest opening that a cache would hold: that of one of the `known` caches, or its first system
        messages."""
        held = (entry.messages for entry in known if self._begins_with(entry))
        return Content(messages=max([_system(self.messages), *held], key=len), tools=self.tools)

    def _begins_with(self, entry: Entry) -> bool:
        n = len(entry.messages)
        return n > 0 and self.messages[:n] == entry.messages and self.tools == entry.tools


def _system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return list(takewhile(lambda message: message["role"] == "system", messages))


def _repeated(opening: list[dict[str, Any]], messages: list[dict[str, Any]]) -> int:
    """How many of the first `messages` are those of the opening."""
    if messages[: len(opening)] == opening:
        return len(opening)
    pairs = zip(_system(opening), messages, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
