"""Tokenizers, and which one reads a model's file."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Set as AbstractSet
from typing import Protocol

from headstart.model_files import is_rkllm
from headstart.prompt.vocabulary import Prefixed
from headstart.toyspec import ToySpec


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
    # Each is imported alone: the libraries of the others take long to load.
    if ToySpec.matches(path):
        from headstart.prompt.toy_tokenizer import ToyTokenizer

        return ToyTokenizer(path)
    if is_rkllm(path):
        from headstart.prompt.hf_tokenizer import HfTokenizer

        return HfTokenizer(path)
    from headstart.prompt.llama_tokenizer import LlamaTokenizer

    return LlamaTokenizer(path)
