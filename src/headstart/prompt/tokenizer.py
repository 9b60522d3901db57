"""Tokenizers, and the choice of one for a model's file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from collections.abc import Set as AbstractSet
from typing import Protocol

from headstart.model_files import Kind, kind_of
from headstart.prompt.vocabulary import Prefixed


class Tokenizer(Protocol):
    """`bos_text` and `eos_text`: the texts of these tokens for the chat template. `template`: the model's own
    chat template, the name of a built-in one, or None. `specials`: the texts of tokens that are found before
    anything else, so that a prompt may be cut after each; empty if that doesn't hold. `gap`: the texts of the
    fill-in-the-middle tokens, for the start, the gap, and the place where it is filled; None if the model has
    none. Token ids are below `n_vocab`. `ends`: a cached prefix must end with one of these tokens; if empty,
    with any. `prefixes`: a space is added before text, only before the first or before each that follows one
    of the tokens `added`."""

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
        """The model's chat template. Raises StartupError if it can't be read."""

    def encode(self, text: str, first: bool = True, *, parse_special: bool = True) -> list[int]:
        """Token ids of a whole prompt: control tokens are recognised, and a leading one is added if the model
        wants it (but not twice). Not `first`: the text follows a special token within a prompt. Not
        `parse_special`: control tokens are treated as text."""

    def piece(self, token: int) -> bytes:
        """The bytes of a generated token; none for control tokens."""

    def written(self, token: int) -> bytes:
        """The bytes of a prompt from which the token was made; control tokens by their names."""


def _llama(path: str) -> Tokenizer:
    from headstart.prompt.llama_tokenizer import LlamaTokenizer

    return LlamaTokenizer(path)


def _rkllm(path: str) -> Tokenizer:
    from headstart.prompt.hf_tokenizer import HfTokenizer

    return HfTokenizer(path)


def _toy(path: str) -> Tokenizer:
    from headstart.prompt.toy_tokenizer import ToyTokenizer

    return ToyTokenizer(path)


# Only the needed one is imported: the libraries of the others take long to load.
LOADERS: Mapping[Kind, Callable[[str], Tokenizer]] = {"llama": _llama, "rkllm": _rkllm, "toy": _toy}


def load_tokenizer(path: str) -> Tokenizer:
    """Raises StartupError if the file is not a GGUF model, or is an NPU model without a tokenizer."""
    return LOADERS[kind_of(path)](path)
