"""Tokenizers: a model's own, read from its GGUF file without the weights, and the toy model's."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Collection
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Protocol

import llama_cpp as lib

from headstart.errors import StartupError
from headstart.model_files import is_rkllm
from headstart.prompt.vocabulary import Prefixed
from headstart.toyspec import BOS, CONTROL, GAP, MERGES, N_BYTES, N_VOCAB, ToySpec

# Vocabularies whose tokenizers look for special tokens first and treat the rest piece by piece.
CUT_AT_SPECIALS = (lib.LLAMA_VOCAB_TYPE_BPE, lib.LLAMA_VOCAB_TYPE_SPM)
SPECIAL = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_USER_DEFINED | lib.LLAMA_TOKEN_ATTR_UNKNOWN
# Tokens that swallow white space beside them, be it a part of another one.
STRIPS = lib.LLAMA_TOKEN_ATTR_LSTRIP | lib.LLAMA_TOKEN_ATTR_RSTRIP


class Tokenizer(Protocol):
    """`bos_text` and `eos_text` are what a chat template may write for these tokens; `template` is the
    model's own chat template, or the name of a built-in one, or None. `specials`: the texts of tokens that
    are found before anything else, so that a prompt may be cut after each; empty where that isn't so. `gap`:
    the texts of the tokens that go before a text with a gap, where the gap is, and where it is to be filled;
    None where the model knows no gaps. Token ids are below `n_vocab`. `ends`: a cached opening must end with
    one of these tokens; empty: with any. `prefixes`: a space is put before text, before the first only or
    before each that follows one of the tokens `added`."""

    bos_text: str
    eos_text: str
    specials: list[str]
    gap: tuple[str, str, str] | None
    n_vocab: int
    ends: AbstractSet[int]
    prefixes: Prefixed
    added: Collection[int]

    @property
    def template(self) -> str | None:
        """Raises StartupError for one that can't be read."""

    def encode(self, text: str, first: bool = True, *, parse_special: bool = True) -> list[int]:
        """Token ids of a whole prompt: control tokens are recognised, a leading one added where the model
        wants it (and not doubled). Not `first`: of what follows a special token within it. Not
        `parse_special`: what looks like a control token is text."""

    def piece(self, token: int) -> bytes:
        """The bytes a generated token stands for; control tokens stand for none."""

    def written(self, token: int) -> bytes:
        """The bytes of a prompt that the token was made from; control tokens by their names."""


def load_tokenizer(path: str) -> Tokenizer:
    """Raises StartupError for a file that is not a GGUF model, or one of the NPU's without a tokenizer."""
    if ToySpec.matches(path):
        return ToyTokenizer(path)
    if is_rkllm(path):
        from headstart.prompt.hf_tokenizer import HfTokenizer

        return HfTokenizer(path)
    return LlamaTokenizer(path)


class LlamaTokenizer:
    ends: AbstractSet[int] = frozenset()
    prefixes: Prefixed = ""
    added: Collection[int] = ()

    def __init__(self, path: str) -> None:
        params = lib.llama_model_default_params()
        params.vocab_only = True
        lib.llama_log_set(_keep_errors, None)
        ERRORS.clear()
        if not Path(path).is_file():
            raise StartupError(f"{path} can't be read: there is no such file")
        self.model = lib.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise StartupError(f"{path} can't be read: it is not a GGUF model llama.cpp knows{_told()}")
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.n_vocab = int(lib.llama_vocab_n_tokens(self.vocab))
        if self.n_vocab <= 0:
            raise StartupError(f"{path} can't be read: it has no tokens")
        self.buffer = ctypes.create_string_buffer(256)
        self.bos_text = self._control_text(lib.llama_vocab_bos(self.vocab))
        self.eos_text = self._control_text(lib.llama_vocab_eos(self.vocab))
        self.adds_bos = bool(lib.llama_vocab_get_add_bos(self.vocab))
        self.specials = self._find_specials()
        self.gap = self._find_gap()

    @property
    def template(self) -> str | None:
        source = lib.llama_model_chat_template(self.model, None)
        try:
            return source.decode() if source else None
        except UnicodeDecodeError as error:
            raise StartupError(f"The model's chat template is not UTF-8: {error}") from error

    def _find_gap(self) -> tuple[str, str, str] | None:
        before, after, between = (
            self._control_text(find(self.vocab))
            for find in (lib.llama_vocab_fim_pre, lib.llama_vocab_fim_suf, lib.llama_vocab_fim_mid)
        )
        return (before, after, between) if before and after and between else None

    def _find_specials(self) -> list[str]:
        if lib.llama_vocab_type(self.vocab) not in CUT_AT_SPECIALS or lib.llama_vocab_get_add_eos(self.vocab):
            return []
        attributes = {i: lib.llama_vocab_get_attr(self.vocab, i) for i in range(self.n_vocab)}
        special = {i: attribute for i, attribute in attributes.items() if attribute & SPECIAL}
        if any(attribute & STRIPS for attribute in special.values()):
            return []
        try:
            return [lib.llama_vocab_get_text(self.vocab, i).decode() for i in special]
        except UnicodeDecodeError:
            return []

    def _control_text(self, token: int) -> str:
        return "" if token < 0 else self._piece(token, special=True).decode(errors="replace")

    def encode(self, text: str, first: bool = True, *, parse_special: bool = True) -> list[int]:
        if first and parse_special and self.adds_bos and self.bos_text:
            text = text.removeprefix(self.bos_text)
        data = text.encode()
        # A token stands for at least one byte; the rest is room for added control tokens.
        tokens = (lib.llama_token * (len(data) + 8))()
        how = first, parse_special
        n_tokens = lib.llama_tokenize(self.vocab, data, len(data), tokens, len(tokens), *how)
        if n_tokens < 0:
            tokens = (lib.llama_token * -n_tokens)()
            n_tokens = lib.llama_tokenize(self.vocab, data, len(data), tokens, len(tokens), *how)
        return tokens[:n_tokens]

    def piece(self, token: int) -> bytes:
        return self._piece(token, special=False)

    def written(self, token: int) -> bytes:
        return self._piece(token, special=True)

    def _piece(self, token: int, special: bool) -> bytes:
        buffer = self.buffer
        size = lib.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = lib.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:size]


# The first thing that llama.cpp has found wrong with the file that is being loaded.
ERRORS: list[str] = []
ERROR_LEVEL = 4
TOLD_CHARACTERS = 200


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_errors(level: int, text: bytes, _user: object) -> None:
    if level == ERROR_LEVEL and not ERRORS:
        ERRORS.append(text.decode(errors="replace"))


def _told() -> str:
    """The first error, in which there may be anything that is in the file."""
    first = "".join(c if c.isprintable() else " " for c in ERRORS[0]) if ERRORS else ""
    return f" ({first.strip()[:TOLD_CHARACTERS]})" if first.strip() else ""


class ToyTokenizer:
    """Bytes, merged greedily from the left where a merge fits, so that text merges across a careless cut."""

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
    """Each token is the first of these that fits, the longest of one kind before others, or a byte."""

    def __init__(self, *kinds: dict[int, bytes]) -> None:
        ordered = [text for kind in kinds for text in sorted(kind.values(), key=len, reverse=True)]
        self.ids = {text: id_ for kind in kinds for id_, text in kind.items()}
        self.ids |= {bytes([byte]): byte for byte in range(N_BYTES)}
        self.token = re.compile(b"|".join(map(re.escape, ordered)) + b"|.", re.DOTALL)

    def tokens(self, data: bytes) -> list[int]:
        ids = self.ids
        return [ids[text] for text in self.token.findall(data)]
