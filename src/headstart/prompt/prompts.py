"""The prompts of one model: requests to token ids, and the prefix that a cache can hold.

The cached prefix of a chat is found without knowledge of the template: the cached messages are rendered
before two different probe messages. The tokens that both prompts begin with don't depend on later messages,
except for the last token, which may merge with the text after it. If a state can't be cut, that token is left
out.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from datetime import date

from headstart.errors import StartupError
from headstart.prompt import reasoning
from headstart.prompt.chat import NO_VARIABLES, UNFINISHED, Message, Tool, Variables
from headstart.prompt.process.protocol import Facts
from headstart.prompt.template import ChatTemplate
from headstart.prompt.token_cache import Memory, RememberedTokens
from headstart.prompt.tokenizer import Tokenizer
from headstart.tokens import common_prefix

PROBES = ("Why?", "3 x")
# Limits of a vocabulary, in tokens and in their bytes: ten times and more what the largest have.
MOST_TOKENS = 1 << 22
MOST_BYTES = 64 << 20


class Prompts:
    """Used by one thread. `can_cut`: a state may be used in part; set it before the first prefix is
    requested. Raises StartupError for a vocabulary larger than that of any model."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        if tokenizer.n_vocab > MOST_TOKENS:
            raise StartupError(f"The model has {tokenizer.n_vocab} tokens; {MOST_TOKENS} are the most.")
        self.tokenizer = tokenizer
        self.template = template
        self.can_cut = True
        self.template_hash = hashlib.sha256(template.source.encode()).hexdigest()
        self._tokens = RememberedTokens(tokenizer.encode, tokenizer.specials, template.source)
        self._prefixes = Memory()
        # The markers of calls and reasoning that are one token; such a token may have no text.
        self.markers = self._find_tokens([*template.call_format.markers, *reasoning.MARKERS])

    def _find_tokens(self, texts: Sequence[str]) -> dict[str, int]:
        encoded = {text: self.tokenizer.encode(text, first=False) for text in texts}
        return {text: tokens[0] for text, tokens in encoded.items() if len(tokens) == 1}

    def facts(self) -> Facts:
        """The vocabulary's facts. Raises StartupError if the tokens have too many bytes."""
        tokenizer, template = self.tokenizer, self.template
        written, ends, answer_bytes = bytearray(), array("I"), {}
        for token in range(tokenizer.n_vocab):
            text, piece = tokenizer.written(token), tokenizer.piece(token)
            written += text
            ends.append(len(written))
            if piece != text:
                answer_bytes[token] = piece
            if len(written) > MOST_BYTES:
                raise StartupError(f"The model's tokens stand for more than {MOST_BYTES >> 20} MB of text.")
        return Facts(
            written=bytes(written),
            ends=ends.tobytes(),
            answer_bytes=answer_bytes,
            prefixed=tokenizer.prefixes,
            added=sorted(tokenizer.added),
            bos_text=tokenizer.bos_text,
            gap=tokenizer.gap,
            template_hash=self.template_hash,
            call_format=template.call_format.name,
            reasons=template.reasons,
            markers=self.markers,
        )

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        variables: Variables = NO_VARIABLES,
    ) -> list[int]:
        """Raises BadRequest if the template refuses the messages or doesn't allow these variables."""
        return self._tokens.encode(self.template.render(messages, tools, variables))

    def text(self, text: str) -> list[int]:
        return self._tokens.encode(text)

    def chat_opening(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """The common prefix of all chats that begin with these messages and tools; its last token may
        differ."""
        written = json.dumps([messages, tools], ensure_ascii=False)
        # A template may write today's date, so prefixes are remembered for a day.
        key = (date.today(), written)
        if (prefix := self._prefixes.get(key)) is None:
            one, other = (self.chat(_continued(messages, probe), tools) for probe in PROBES)
            shared = self._ended(one[: common_prefix(one, other)])
            prefix = shared if self.can_cut else shared[:-1]
            self._prefixes.put(key, len(written), prefix)
        return prefix

    def text_opening(self, text: str) -> list[int]:
        """The tokens of a text that other text will follow."""
        if (prefix := self._prefixes.get(text)) is None:
            tokens = self.text(text)
            prefix = tokens if self.can_cut else tokens[:-1]
            self._prefixes.put(text, len(text), prefix)
        return prefix

    def _ended(self, prefix: list[int]) -> list[int]:
        """The prefix up to the last token that may end one, if there is such a token."""
        ends = self.tokenizer.ends
        at = next((i for i in range(len(prefix), 0, -1) if prefix[i - 1] in ends), len(prefix))
        return prefix[:at]


def _continued(messages: Sequence[Message], probe: str) -> list[Message]:
    if messages and messages[-1].get(UNFINISHED):
        return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + probe}]
    return [*messages, {"role": "user", "content": probe}]
