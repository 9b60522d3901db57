"""The bytes of a model's tokens and the properties of its template: all that is needed to turn answers into
text."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence
from typing import Literal

from headstart.prompt import reasoning
from headstart.prompt.process.protocol import Facts
from headstart.prompt.tool_calls.formats import named

Prefixed = Literal["", "first", "each"]


class Vocabulary:
    """Built from the facts that a prompt process reported. Unknown token ids have no bytes."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.bos_text, self.gap = facts.bos_text, facts.gap
        self.template_hash = facts.template_hash
        self.call_format, self.reasons, self.markers = named(facts.call_format), facts.reasons, facts.markers
        self._ends = array("I", facts.ends)
        self._added = frozenset(facts.added)
        self.n_vocab = len(self._ends)

    def written(self, token: int) -> bytes:
        """The bytes of a prompt from which the token was made; control tokens by their names."""
        if not 0 <= token < self.n_vocab:
            return b""
        return self.facts.written[self._ends[token - 1] if token else 0 : self._ends[token]]

    def piece(self, token: int) -> bytes:
        """The bytes of a generated token; none for control tokens."""
        answer_bytes = self.facts.answer_bytes.get(token)
        return self.written(token) if answer_bytes is None else answer_bytes

    def text(self, tokens: Sequence[int]) -> str:
        """The text of these tokens, with U+FFFD if they end within a character."""
        return joined(tokens, self.written, self.facts.prefixed, self._added)

    def spelled(self, *, calls: bool) -> Callable[[int], bytes]:
        """The bytes of tokens in a chat's answer, including the markers of reasoning and, with `calls`, of
        calls."""
        texts = [*reasoning.MARKERS, *(self.call_format.markers if calls else ())]
        written = {self.markers[text]: text.encode() for text in texts if text in self.markers}
        piece = self.piece
        return (lambda token: written.get(token) or piece(token)) if written else piece


def joined(
    tokens: Sequence[int], written: Callable[[int], bytes], prefixed: Prefixed, added: Collection[int]
) -> str:
    """The text of these tokens, without the spaces that a tokenizer adds before text."""
    parts = bytearray()
    is_prefixed = bool(prefixed)
    for token in tokens:
        part = written(token)
        parts += part.removeprefix(b" ") if is_prefixed and part[:1] == b" " else part
        is_prefixed = prefixed == "each" and token in added
    return parts.decode(errors="replace")
