"""A chat as templates take it, and how it relates to cached prefixes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, NamedTuple

from headstart.caches.entry import Content, Entry
from headstart.prompt.chat import UNFINISHED, Variables, is_open
from headstart.prompt.process import protocol
from headstart.service.interface.sameness import SameMessages, same_tools, written_alike
from headstart.tokens import common_text

# So many characters at the beginning of a text are worth a state.
NEAR = 256


class NearCache(NamedTuple):
    """`n_messages`: the number of first messages that a cache and a chat have in common; `n_characters`: of
    those with which the message after these begins in both."""

    entry: Entry | None
    n_messages: int
    n_characters: int


@dataclass(frozen=True)
class Chat:
    """`messages` and `tools` as templates take them. `variables`: further template variables, which don't
    affect cached prefixes."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    variables: Variables = field(default_factory=dict)

    def after(self, cached: Content, same: SameMessages) -> Chat:
        """The cached prefix followed by this chat. Messages that repeat the prefix, all of it or its first
        system messages, are left out. A chat without tools, or with the cache's, gets the cache's."""
        prefix = cached.prefix_messages
        n = same.count(prefix, self.messages, cached.tools)
        own = self.messages[n if n == len(prefix) else min(n, len(_system(prefix))) :]
        tools = self._tools_of(cached) if self.tools else cached.tools
        return replace(self, messages=[*prefix, *own], tools=tools)

    def worded_as(self, cached: Content, same: SameMessages) -> Chat:
        """The chat with the cache's first messages and tools in place of its own as far as they are the same:
        these are what its state was computed from."""
        prefix = cached.prefix_messages
        n = same.count(prefix, self.messages, cached.tools)
        return replace(self, messages=[*prefix[:n], *self.messages[n:]], tools=self._tools_of(cached))

    def _tools_of(self, cached: Content) -> list[dict[str, Any]]:
        return cached.tools if same_tools(self.tools, cached.tools) else self.tools

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
        """The chat's longest prefix that one of the `known` caches holds, written alike."""
        prefixes = (Content(messages=entry.content.prefix_messages, tools=entry.tools) for entry in known)
        longest_first = sorted(filter(self.begins_with, prefixes), key=_length, reverse=True)
        return next(filter(self._is_written_like, longest_first), None)

    def _is_written_like(self, prefix: Content) -> bool:
        """Whether what is equal to the prefix also has its keys in the same order."""
        whole = prefix.messages[:-1] if prefix.messages[-1].get(UNFINISHED) else prefix.messages
        return written_alike([self.messages[: len(whole)], self.tools], [whole, prefix.tools])

    def nearest(self, known: Iterable[Entry], same: SameMessages) -> NearCache | None:
        """The known cache that begins most like the chat, though it may be written otherwise and go on in
        another way. None if they have hardly anything in common."""
        best = NearCache(None, 0, NEAR - 1)
        for entry in known:
            prefix = entry.content.prefix_messages
            n = same.count(prefix, self.messages, entry.tools)
            if entry.tools != self.tools:
                # Templates write tools near the system message.
                n = min(n, len(_system(prefix)))
            if n >= best.n_messages:
                following = zip(prefix[n : n + 1], self.messages[n : n + 1], strict=False)
                near = NearCache(entry, n, sum(_alike(one, other) for one, other in following))
                best = max(best, near, key=lambda each: (each.n_messages, each.n_characters))
        return best if best.entry else None

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


def _alike(one: dict[str, Any], other: dict[str, Any]) -> int:
    """The number of characters with which both begin."""
    if one["role"] != other["role"] or one["content"][:NEAR] != other["content"][:NEAR]:
        return 0
    return common_text(one["content"], other["content"])
