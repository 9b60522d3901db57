"""A model's tokens, as grammars are compiled for them."""

from __future__ import annotations

from typing import Any

import llama_cpp as lib
from llguidance import LLTokenizer
from llguidance.llamacpp import lltokenizer_from_vocab


def vocabulary(vocab: Any) -> LLTokenizer:
    """All tokens that end an answer may end one that a grammar allows to end."""
    ends = [i for i in range(lib.llama_vocab_n_tokens(vocab)) if lib.llama_vocab_is_eog(vocab, i)]
    # llguidance takes the first of them for the usual one.
    ends.sort(key=lambda token: token != lib.llama_vocab_eos(vocab))
    return lltokenizer_from_vocab(vocab, eos_token=ends or None)
