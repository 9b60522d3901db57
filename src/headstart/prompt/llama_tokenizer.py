"""The tokenizer of a GGUF model, read by llama.cpp without the weights."""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from collections.abc import Set as AbstractSet
from pathlib import Path

import llama_cpp as lib

from headstart.errors import StartupError
from headstart.prompt.vocabulary import Prefixed

# Vocabulary types whose tokenizers find special tokens first and treat the text between them part by part.
CUT_AT_SPECIALS = (lib.LLAMA_VOCAB_TYPE_BPE, lib.LLAMA_VOCAB_TYPE_SPM)
SPECIAL = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_USER_DEFINED | lib.LLAMA_TOKEN_ATTR_UNKNOWN
# Tokens that remove adjacent white space, even if it belongs to another token.
STRIPS = lib.LLAMA_TOKEN_ATTR_LSTRIP | lib.LLAMA_TOKEN_ATTR_RSTRIP


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


# The first error that llama.cpp reported for the file being loaded.
ERRORS: list[str] = []
ERROR_LEVEL = 4
TOLD_CHARACTERS = 200


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_errors(level: int, text: bytes, _user: object) -> None:
    if level == ERROR_LEVEL and not ERRORS:
        ERRORS.append(text.decode(errors="replace"))


def _told() -> str:
    """The first error, made printable: it may contain any text of the file."""
    first = "".join(c if c.isprintable() else " " for c in ERRORS[0]) if ERRORS else ""
    return f" ({first.strip()[:TOLD_CHARACTERS]})" if first.strip() else ""
