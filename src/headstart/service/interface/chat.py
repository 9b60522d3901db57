"""A chat as templates take it, and how it relates to cached prefixes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from headstart.caches.entry import Content, Entry
from headstart.prompt.chat import UNFINISHED, Variables, is_open
from headstart.prompt.process import protocol


@dataclass(frozen=True)
class Chat:
    """`messages` and `tools` as templates take them. `variables`: further template variables, which don't
    affect cached prefixes."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    variables: Variables = field(default_factory=dict)

    def after(self, cached: Content) -> Chat:
        """The cached prefix followed by this chat. Messages that repeat the prefix, all of it or its first
        system messages, are left out. A chat without tools gets the cache's."""
        prefix = cached.prefix_messages
        own = self.messages[_repeated(prefix, self.messages) :]
        # Equal tools may be written in another order, which would be another prompt.
        others = self.tools and self.tools != cached.tools
        return replace(self, messages=[*prefix, *own], tools=self.tools if others else cached.tools)

    def answered(self, text: str) -> Chat:
        """The chat with the answer, which may continue the last message."""
        if is_open(self.messages):
            *before, last = self.messages
            return replace(self, messages=[*before, {**last, "content": last["content"] + text}])
        return replace(self, messages=[*self.messages, {"role": "assistant", "content": text}])

    @property
    def prompt(self) -> protocol.ChatPrompt:
        return protocol.ChatPrompt(self.messages, self.tools, dict(self.variables))

    def cacheable_prefix(self, known: Iterable[Entry]) -> Content:
        """The chat's longest prefix that a cache could hold: that of one of the `known` caches, or its first
        system messages."""
        system = Content(messages=_system(self.messages), tools=self.tools)
        return max(system, self.cached_prefix(known) or system, key=_length)

    def cached_prefix(self, known: Iterable[Entry]) -> Content | None:
        """The chat's longest prefix that one of the `known` caches holds."""
        prefixes = (Content(messages=entry.content.prefix_messages, tools=entry.tools) for entry in known)
        return max(filter(self.begins_with, prefixes), key=_length, default=None)

    def up_to(self, n_messages: int, n_characters: int) -> Content:
        """The first messages, with only the first characters of the last one. The last message is left
        unfinished, except a complete system prompt, since a user's message follows that."""
        *whole, last = self.messages[:n_messages]
        if last["role"] != "system" or n_characters < len(last["content"]):
            last = {**last, "content": last["content"][:n_characters], UNFINISHED: True}
        return Content(messages=[*whole, last], tools=self.tools)

    def begins_with(self, prefix: Content) -> bool:
        *whole, last = prefix.prefix_messages or [{}]
        n = len(prefix.prefix_messages)
        if not 0 < n <= len(self.messages) or self.tools != prefix.tools:
            return False
        return self.messages[: n - 1] == whole and _begins(self.messages[n - 1], last)


def _system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return list(takewhile(lambda message: message["role"] == "system", messages))


def _begins(message: dict[str, Any], prefix: dict[str, Any]) -> bool:
    if not prefix.get(UNFINISHED):
        return message == prefix
    same_role = message["role"] == prefix["role"]
    return same_role and bool(message["content"].startswith(prefix["content"]))


def _length(prefix: Content) -> tuple[int, bool, int]:
    """Sort key that orders prefixes of one chat by length."""
    if not prefix.messages:
        return 0, True, 0
    last = prefix.messages[-1]
    return len(prefix.messages), not last.get(UNFINISHED), len(last["content"])


def _repeated(prefix: list[dict[str, Any]], messages: list[dict[str, Any]]) -> int:
    """The number of first `messages` that repeat those of `prefix`."""
    if messages[: len(prefix)] == prefix:
        return len(prefix)
    pairs = zip(_system(prefix), messages, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
