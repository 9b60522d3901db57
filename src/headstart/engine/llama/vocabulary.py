"""A model's tokens in the form that grammars are compiled for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import llama_cpp as lib

if TYPE_CHECKING:
    from llguidance import LLTokenizer


def vocabulary(vocab: Any) -> LLTokenizer:
    """The vocabulary for llguidance. Where a grammar allows the end, all tokens that end an answer are
    allowed."""
    from llguidance.llamacpp import lltokenizer_from_vocab

    ends = [i for i in range(lib.llama_vocab_n_tokens(vocab)) if lib.llama_vocab_is_eog(vocab, i)]
    # llguidance treats the first as the primary one.
    ends.sort(key=lambda token: token != lib.llama_vocab_eos(vocab))
    return lltokenizer_from_vocab(vocab, eos_token=ends or None)
