"""Tokenises long prompts without repeating earlier work.

Tokenizers find the texts of special tokens first and treat the text between them part by part. So a text may
be cut after each special token and its parts tokenised separately. The parts are remembered: a system prompt,
the earlier turns of a conversation, and the few words that a template writes between messages, which cost
llama.cpp about as much as a question does. llama.cpp treats BPE and SentencePiece vocabularies this way
(`tokenize` and `tokenizer_st_partition` in llama-vocab.cpp).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

from headstart.tokens import overlap

# Bytes of one memory, and estimates of what Python needs for an entry, a character and a number.
REMEMBERED_BYTES = 16 << 20
ENTRY_BYTES, CHARACTER_BYTES, TOKEN_BYTES = 300, 4, 36
# A shorter last part may be the text with which a template ends every prompt.
ENDING = 200

Encode = Callable[[str, bool], list[int]]


class Memory:
    """Tokens by their source, bounded in bytes; the least recently used go first. The lists must not be
    changed."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, tuple[list[int], int]] = OrderedDict()
        self._size = 0

    def get(self, key: Hashable) -> list[int] | None:
        if found := self._known.get(key):
            self._known.move_to_end(key)
        return found[0] if found else None

    def put(self, key: Hashable, n_characters: int, tokens: list[int]) -> None:
        size = ENTRY_BYTES + CHARACTER_BYTES * n_characters + TOKEN_BYTES * len(tokens)
        _, before = self._known.pop(key, (None, 0))
        self._known[key] = tokens, size
        self._size += size - before
        while self._size > REMEMBERED_BYTES:
            _, (_, freed) = self._known.popitem(last=False)
            self._size -= freed


class RememberedTokens:
    """`encode(text, first)` tokenises a part of a prompt; `first` is true at its beginning. `specials`: the
    texts of all tokens that it finds before anything else. `template`: the source of the template of the
    prompts."""

    def __init__(self, encode: Encode, specials: Sequence[str], template: str) -> None:
        self._encode = encode
        seams = [text for text in specials if text in template and _stands_alone(text, specials)]
        longest_first = sorted(map(re.escape, seams), key=len, reverse=True)
        self._seam = re.compile("|".join(longest_first)) if seams else None
        self._memory = Memory()

    def encode(self, text: str) -> list[int]:
        """The same tokens as from `encode(text, True)`."""
        parts = self._parts(text)
        tokens: list[int] = []
        for i, part in enumerate(parts):
            found = self._memory.get((part, i == 0))
            tokens += self._tokenise(part, first=i == 0, last=i == len(parts) - 1) if found is None else found
        return tokens

    def _parts(self, text: str) -> list[str]:
        """Parts that each end with a special token, except the last."""
        ends = [match.end() for match in self._seam.finditer(text)] if self._seam else []
        return [text[start:end] for start, end in zip([0, *ends], [*ends, None], strict=True)]

    def _tokenise(self, part: str, *, first: bool, last: bool) -> list[int]:
        tokens = self._encode(part, first)
        if not last or len(part) < ENDING:
            self._memory.put((part, first), len(part), tokens)
        return tokens


def _stands_alone(text: str, specials: Sequence[str]) -> bool:
    """Whether no other special token can overlap with this one or contain it, so that it is always found."""
    others = [other for other in specials if other != text]
    # This one may begin with another as a whole, hence [1:].
    return not any(overlap(text, other) or overlap(other[1:], text) or text in other for other in others)
