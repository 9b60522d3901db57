"""Timed llama.cpp contexts, with tokens chosen at random."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from random import Random
from time import perf_counter
from typing import Any

import llama_cpp as lib

from headstart.engine.llama.context import LlamaContext, Shape
from headstart.engine.llama.conversion import weights_to_try
from headstart.engine.llama.gguf import attends_to_everything, open_model
from headstart.engine.model import ModelError, Piece
from headstart.engine.trials import Span, TrialShape
from headstart.engine.tuning.machine_load import Watch
from headstart.numerics import Weights
from headstart.protocol import EngineSettings

SEED = 1
# llama.cpp allocates cells to sequences in blocks of this size.
CELLS = 256


class LlamaTrials:
    """The model with its own weights and, if worth trying or requested, converted ones. Raises ModelError."""

    def __init__(self, settings: EngineSettings) -> None:
        self.models = {weights: open_model(path) for weights, path in weights_to_try(settings).items()}
        self.weights: Seq[Weights] = list(self.models)
        self.watch = Watch()
        self.can_share = attends_to_everything(self.models[self.weights[0]])
        self.words = self._words()

    def _words(self) -> list[int]:
        """A few thousand tokens as a substitute for text."""
        vocab = lib.llama_model_get_vocab(self.models[self.weights[0]])
        n_tokens = lib.llama_vocab_n_tokens(vocab)
        chosen = Random(SEED).choices(range(n_tokens), k=4096)
        return [token for token in chosen if not lib.llama_vocab_is_control(vocab, token)] or chosen

    def trial(self, shape: TrialShape) -> LlamaTrial:
        assert shape.numerics.weights
        model = self.models[shape.numerics.weights]
        return LlamaTrial(model, shape, self.words)

    def close(self) -> None:
        for model in self.models.values():
            lib.llama_model_free(model)


class LlamaTrial:
    def __init__(self, model: Any, shape: TrialShape, words: list[int]) -> None:
        self.words = words
        self.closed = False
        cells = -(-shape.tokens // CELLS) * CELLS * (shape.sequences if shape.streams else 1)
        self.context = LlamaContext(
            model,
            Shape(
                cells=cells,
                sequences=shape.sequences,
                streams=shape.streams,
                batch=shape.batch,
                threads=shape.threads,
                flash_attention=bool(shape.numerics.flash_attention),
            ),
        )

    def evaluate(self, spans: Seq[Span]) -> float:
        pieces = [Piece(span.seq, span.start, self._tokens(span), sample=True) for span in spans]
        started = perf_counter()
        self.context.evaluate(pieces)
        return 1000 * (perf_counter() - started)

    def _tokens(self, span: Span) -> list[int]:
        return [self.words[(span.start + i) % len(self.words)] for i in range(span.n)]

    def set_threads(self, n: int) -> None:
        lib.llama_set_n_threads(self.context.context, n, n)

    def cut(self, seq: int, n_tokens: int) -> bool:
        return self.context.cut(seq, n_tokens)

    def share(self, source: int, seq: int) -> None:
        lib.llama_memory_seq_cp(self.context.memory, source, seq, -1, -1)

    def save(self, seq: int) -> tuple[memoryview, int, int]:
        return self.context.save(seq)

    def restore(self, seq: int, state: tuple[memoryview, int, int]) -> None:
        memory, start, end = state
        # A copy, because restoring overwrites it.
        if not self.context.restore(seq, memoryview(bytearray(memory)), start, end):
            raise ModelError("llama.cpp could not restore its own state")

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            lib.llama_batch_free(self.context.batch)
            lib.llama_free(self.context.context)
