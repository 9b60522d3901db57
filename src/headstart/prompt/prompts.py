"""The prompts of one model: requests to token ids, and the part of them that a cache can hold.

The cached part of a chat is found without knowing the template: the cached messages are rendered before two
different probe messages, and the tokens both begin with are the ones any later message leaves as they are,
but for the last, which may merge with what follows it. Where a state can't be cut, that one is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import date
from functools import lru_cache

from headstart.prompt.remembered import RememberedTokens
from headstart.prompt.template import ChatTemplate, Message
from headstart.prompt.tokenizer import Tokenizer
from headstart.tokens import common_prefix

PROBES = ("Why?", "3 x")
# Openings that are remembered, and the characters of the longest: together some tens of megabytes at most.
REMEMBERED_OPENINGS = 128
REMEMBERED_CHARACTERS = 64 << 10


class Prompts:
    """Not safe for use by several threads at once where `tokenizer` isn't; both real ones are. `can_cut`: a
    state may be used in part; to be set before the first opening is asked for."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.can_cut = True
        self.template_hash = hashlib.sha256(template.source.encode()).hexdigest()
        self._remembered = RememberedTokens(tokenizer.encode, tokenizer.specials, template.source)
        self._chat_opening = lru_cache(REMEMBERED_OPENINGS)(self._find_chat_opening)
        self._text_opening = lru_cache(REMEMBERED_OPENINGS)(self._find_text_opening)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Raises BadRequest when the template refuses the messages."""
        return self._remembered.encode(self.template.render(messages))

    def text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def chat_opening(self, messages: Sequence[Message]) -> list[int]:
        """The tokens that every chat opening with these messages shares, but for the last now and then."""
        opening = tuple((message["role"], message["content"]) for message in messages)
        if sum(len(content) for _, content in opening) > REMEMBERED_CHARACTERS:
            return list(self._find_chat_opening(opening, date.today()))
        # A template may write today's date, so what is remembered is remembered for a day.
        return list(self._chat_opening(opening, date.today()))

    def text_opening(self, text: str) -> list[int]:
        """The tokens of a text that others will continue."""
        find = self._text_opening if len(text) <= REMEMBERED_CHARACTERS else self._find_text_opening
        return list(find(text))

    def _find_text_opening(self, text: str) -> tuple[int, ...]:
        tokens = self.text(text)
        return tuple(tokens if self.can_cut else tokens[:-1])

    def _find_chat_opening(self, messages: tuple[tuple[str, str], ...], _day: date) -> tuple[int, ...]:
        opening = [{"role": role, "content": content} for role, content in messages]
        one, other = (self.chat([*opening, {"role": "user", "content": probe}]) for probe in PROBES)
        shared = one[: common_prefix(one, other)]
        return tuple(shared if self.can_cut else shared[:-1])
