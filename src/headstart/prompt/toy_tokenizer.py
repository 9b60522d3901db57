"""The toy model's tokenizer."""

from __future__ import annotations

import re
from collections.abc import Collection
from collections.abc import Set as AbstractSet

from headstart.errors import StartupError
from headstart.prompt.vocabulary import Prefixed
from headstart.toyspec import BOS, CONTROL, GAP, MERGES, N_BYTES, N_VOCAB, ToySpec


class ToyTokenizer:
    """Bytes, merged greedily from the left, so that text merges across a careless cut."""

    bos_text, eos_text, n_vocab = "<s>", "</s>", N_VOCAB
    ends: AbstractSet[int] = frozenset()
    prefixes: Prefixed = ""
    added: Collection[int] = ()

    def __init__(self, path: str) -> None:
        try:
            spec = ToySpec.parse(path)
        except ValueError as error:
            raise StartupError(str(error)) from error
        self.template: str | None = spec.template
        known = CONTROL | (GAP if spec.gap else {})
        before, after, between = GAP
        self.gap = (before, after, between) if spec.gap else None
        self.specials = list(known)
        self.names = {id_: text.encode() for text, id_ in known.items()}
        self.pieces = dict(enumerate(MERGES, N_BYTES))
        self.plain = _Merges(self.pieces)
        self.with_specials = _Merges(self.names, self.pieces)

    def encode(self, text: str, first: bool = True, *, parse_special: bool = True) -> list[int]:
        tokens = (self.with_specials if parse_special else self.plain).tokens(text.encode())
        return tokens if tokens[:1] == [BOS] or not first else [BOS, *tokens]

    def piece(self, token: int) -> bytes:
        assert 0 <= token < N_VOCAB
        if token < N_BYTES:
            return bytes([token])
        return b"" if token >= BOS else self.pieces[token]

    def written(self, token: int) -> bytes:
        return self.names.get(token) or self.piece(token)


class _Merges:
    """Each token is the first match: the longest of the first kind, then of the others, or a byte."""

    def __init__(self, *kinds: dict[int, bytes]) -> None:
        ordered = [text for kind in kinds for text in sorted(kind.values(), key=len, reverse=True)]
        self.ids = {text: id_ for kind in kinds for id_, text in kind.items()}
        self.ids |= {bytes([byte]): byte for byte in range(N_BYTES)}
        self.token = re.compile(b"|".join(map(re.escape, ordered)) + b"|.", re.DOTALL)

    def tokens(self, data: bytes) -> list[int]:
        ids = self.ids
        return [ids[text] for text in self.token.findall(data)]
