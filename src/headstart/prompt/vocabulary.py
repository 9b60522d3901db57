"""What a model's tokens stand for, and what its template teaches: answers become text by it alone."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence
from typing import Literal

from headstart.prompt import reasoning
from headstart.prompt.process.protocol import Facts
from headstart.prompt.tool_calls.formats import named

Prefixed = Literal["", "first", "each"]


class Vocabulary:
    """Made of what a prompt process has told. Bytes of tokens that there are not are none."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.bos_text, self.gap = facts.bos_text, facts.gap
        self.template_hash = facts.template_hash
        self.dialect, self.reasons, self.markers = named(facts.dialect), facts.reasons, facts.markers
        self._ends = array("I", facts.ends)
        self._added = frozenset(facts.added)
        self.n_vocab = len(self._ends)

    def written(self, token: int) -> bytes:
        """The bytes of a prompt that the token was made from; control tokens by their names."""
        if not 0 <= token < self.n_vocab:
            return b""
        return self.facts.written[self._ends[token - 1] if token else 0 : self._ends[token]]

    def piece(self, token: int) -> bytes:
        """The bytes a generated token stands for; control tokens stand for none."""
        spoken = self.facts.spoken.get(token)
        return self.written(token) if spoken is None else spoken

    def text(self, tokens: Sequence[int]) -> str:
        """The prompt that these are the tokens of, U+FFFD where they end within a character."""
        return joined(tokens, self.written, self.facts.prefixed, self._added)

    def spelled(self, *, calls: bool) -> Callable[[int], bytes]:
        """What the tokens of a chat's answer stand for: what marks reasoning, and `calls` if so asked, is
        there to be read."""
        texts = [*reasoning.MARKERS, *(self.dialect.markers if calls else ())]
        written = {self.markers[text]: text.encode() for text in texts if text in self.markers}
        piece = self.piece
        return (lambda token: written.get(token) or piece(token)) if written else piece


def joined(
    tokens: Sequence[int], written: Callable[[int], bytes], prefixed: Prefixed, added: Collection[int]
) -> str:
    """The text of which these are the tokens, without the spaces that a tokenizer puts before text."""
    parts = bytearray()
    is_prefixed = bool(prefixed)
    for token in tokens:
        part = written(token)
        parts += part.removeprefix(b" ") if is_prefixed and part[:1] == b" " else part
        is_prefixed = prefixed == "each" and token in added
    return parts.decode(errors="replace")
