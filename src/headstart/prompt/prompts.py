"""The prompts of one model: requests to token ids, and the part of them that a cache can hold.

The cached part of a chat is found without knowing the template: the cached messages are rendered before two
different probe messages, and the tokens both begin with are the ones any later message leaves as they are,
but for the last, which may merge with what follows it. Where a state can't be cut, that one is left out.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from datetime import date

from headstart.prompt import reasoning
from headstart.prompt.remembered import LOOKING_UP, Memory, RememberedTokens, TakesLong
from headstart.prompt.template import NO_VARIABLES, ChatTemplate, Message, Tool, Variables
from headstart.prompt.tokenizer import Tokenizer
from headstart.tokens import common_prefix

PROBES = ("Why?", "3 x")
# The key of a message, the last of an opening, whose text goes on in other ways.
UNFINISHED = "unfinished"
# Characters that are tokenised in less than a millisecond.
QUICK = 2000


async def soon(tokenise: Callable[[int], list[int]]) -> list[int]:
    """What `tokenise` gives, a function of the most characters it may tokenise: called here where that is
    quick, else on another thread, so that the event loop goes on."""
    try:
        return tokenise(QUICK)
    except TakesLong:
        return await asyncio.to_thread(tokenise, sys.maxsize)


class Prompts:
    """Not safe for use by several threads at once where `tokenizer` isn't; both real ones are. `can_cut`: a
    state may be used in part; to be set before the first opening is asked for. All methods raise TakesLong,
    at once, rather than tokenise more than `most` characters."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.can_cut = True
        self.template_hash = hashlib.sha256(template.source.encode()).hexdigest()
        self._tokens = RememberedTokens(tokenizer.encode, tokenizer.specials, template.source)
        self._openings = Memory()
        # Of what calls and reasoning are marked with, what is one token; it may be no text.
        self.markers = self._find_tokens([*template.dialect.markers, *reasoning.MARKERS])

    def _find_tokens(self, texts: Sequence[str]) -> dict[str, int]:
        encoded = {text: self.tokenizer.encode(text, first=False) for text in texts}
        return {text: tokens[0] for text, tokens in encoded.items() if len(tokens) == 1}

    def spelled(self, *, calls: bool) -> Callable[[int], bytes]:
        """What the tokens of a chat's answer stand for: what marks reasoning, and `calls` if so asked, is
        there to be read."""
        texts = [*reasoning.MARKERS, *(self.template.dialect.markers if calls else ())]
        written = {self.markers[text]: text.encode() for text in texts if text in self.markers}
        piece = self.tokenizer.piece
        return (lambda token: written.get(token) or piece(token)) if written else piece

    def chat(
        self,
        messages: Sequence[Message],
        most: int = sys.maxsize,
        tools: Sequence[Tool] = (),
        variables: Variables = NO_VARIABLES,
    ) -> list[int]:
        """Raises BadRequest when the template refuses the messages or has no such variables."""
        if _characters(messages) > LOOKING_UP * most:
            raise TakesLong
        return self._tokens.encode(self.template.render(messages, tools, variables), most)

    def text(self, text: str, most: int = sys.maxsize) -> list[int]:
        return self._tokens.encode(text, most)

    def chat_opening(
        self, messages: Sequence[Message], most: int = sys.maxsize, tools: Sequence[Tool] = ()
    ) -> list[int]:
        """The tokens that every chat opening with these messages and tools shares, but for the last now and
        then."""
        if _characters(messages) > LOOKING_UP * most:
            raise TakesLong
        written = json.dumps([messages, tools], ensure_ascii=False)
        # A template may write today's date, so what is remembered is remembered for a day.
        key = (date.today(), written)
        if (opening := self._openings.get(key)) is None:
            one, other = (self.chat(_continued(messages, probe), most, tools) for probe in PROBES)
            shared = one[: common_prefix(one, other)]
            opening = shared if self.can_cut else shared[:-1]
            self._openings.put(key, len(written), opening)
        return opening.copy()

    def text_opening(self, text: str, most: int = sys.maxsize) -> list[int]:
        """The tokens of a text that others will continue."""
        if (opening := self._openings.get(text)) is None:
            tokens = self.text(text, most)
            opening = tokens if self.can_cut else tokens[:-1]
            self._openings.put(text, len(text), opening)
        return opening.copy()


def _characters(messages: Sequence[Message]) -> int:
    return sum(len(message["content"]) for message in messages)


def _continued(messages: Sequence[Message], probe: str) -> list[Message]:
    if messages and messages[-1].get(UNFINISHED):
        return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + probe}]
    return [*messages, {"role": "user", "content": probe}]
