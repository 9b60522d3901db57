"""Embeddings by llama.cpp, in a context of their own.

The context returns each token's embedding; they are pooled here, so that a long input may be evaluated in
pieces. Models that read an input in both directions, as encoders do, need it whole.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import llama_cpp as lib
import numpy as np

from headstart.engine.llama.context import LlamaContext, Shape
from headstart.engine.llama.pooling import Pooled, Pooling
from headstart.engine.model import ModelError, Piece, TooLarge
from headstart.machine import available_bytes

FLOAT_BYTES = 4


class LlamaEmbedder:
    """`shape`: that of the context, which is created anew when an input must be whole and is longer than the
    batch. Raises ModelError if it can't be created."""

    def __init__(self, model: Any, shape: Shape, pooling: Pooling) -> None:
        assert shape.embeddings
        self.model = model
        self.pooling = pooling
        self.context = LlamaContext(model, shape)
        self.whole = not self.context.generates
        self.clear()

    def clear(self) -> None:
        self.context.clear(0)
        self.pooled = Pooled(self.pooling)

    def evaluate(self, start: int, tokens: Seq[int]) -> None:
        if len(tokens) > self.context.shape.batch:
            self._make_room(len(tokens))
        self.context.evaluate([Piece(0, start, tokens, sample=False)])
        embeddings = lib.llama_get_embeddings(self.context.context)
        if not embeddings:
            raise ModelError("llama.cpp gave none")
        size = lib.llama_model_n_embd_out(self.model)
        self.pooled.add(np.ctypeslib.as_array(embeddings, (len(tokens), size)))

    def _make_room(self, n_tokens: int) -> None:
        """Replaces the context by one with a larger batch. Raises ModelError; the old one remains then."""
        assert self.whole
        needed = n_tokens**2 * lib.llama_model_n_head(self.model) * FLOAT_BYTES
        if not self.context.shape.flash_attention and needed > available_bytes():
            raise TooLarge(
                f"an input of {n_tokens} tokens takes {needed >> 20} MB of memory, which are not available"
            )
        larger = LlamaContext(self.model, replace(self.context.shape, batch=n_tokens))
        self.context.close()
        self.context = larger

    def vector(self) -> bytes:
        return self.pooled.vector()
