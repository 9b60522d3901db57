"""Tokenising long prompts without repeating what was tokenised before.

Tokenizers look for the texts of special tokens first and treat what lies between them piece by piece. So a
text may be cut after each of them, the parts tokenised alone, and a long part (a system prompt, an earlier
turn of a conversation) remembered. llama.cpp's do so for BPE and SentencePiece vocabularies (`tokenize` and
`tokenizer_st_partition` in llama-vocab.cpp).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

# Characters of a part worth remembering, and of all that is remembered.
LONG = 200
REMEMBERED = 4 << 20

Encode = Callable[[str, bool], list[int]]


class RememberedTokens:
    """`encode(text, first)` tokenises a part of a prompt, `first` meaning its beginning; `specials` are the
    texts of all tokens it finds before it looks at anything else, `template` the source of what prompts are
    made with. Safe for use by several threads if `encode` is."""

    def __init__(self, encode: Encode, specials: Sequence[str], template: str) -> None:
        self._encode = encode
        seams = [text for text in specials if text in template and _stands_alone(text, specials)]
        longest_first = sorted(map(re.escape, seams), key=len, reverse=True)
        self._seam = re.compile("|".join(longest_first)) if seams else None
        self._known: OrderedDict[tuple[str, bool], list[int]] = OrderedDict()
        self._size = 0

    def encode(self, text: str) -> list[int]:
        """The same tokens as `encode(text, True)` gives."""
        tokens: list[int] = []
        short = ""
        for part in self._parts(text):
            if len(part) < LONG:
                short += part
                continue
            if short:
                tokens += self._encode(short, not tokens)
                short = ""
            tokens += self._long(part, not tokens)
        return tokens + self._encode(short, not tokens) if short or not tokens else tokens

    def _parts(self, text: str) -> Iterator[str]:
        """Parts that each end with a special token, but for the last."""
        at = 0
        for match in self._seam.finditer(text) if self._seam else ():
            yield text[at : match.end()]
            at = match.end()
        if at < len(text):
            yield text[at:]

    def _long(self, part: str, first: bool) -> list[int]:
        key = (part, first)
        if (known := self._known.pop(key, None)) is None:
            known = self._encode(part, first)
            self._size += len(part)
        self._known[key] = known
        while self._size > REMEMBERED and len(self._known) > 1:
            (oldest, _), _ = self._known.popitem(last=False)
            self._size -= len(oldest)
        return known


def _stands_alone(text: str, specials: Sequence[str]) -> bool:
    """Whether no other special token can overlap with this one or contain it, so that it is always found."""
    return not any(
        _overlap(text, other) or _overlap(other, text) or text in other for other in specials if other != text
    )


def _overlap(one: str, other: str) -> bool:
    """Whether an end of `one` is a beginning of `other`."""
    return any(one.endswith(other[:n]) for n in range(1, min(len(one), len(other))))
