"""A GGUF model and its two contexts.

In the first, each slot has a KV stream of its own (`kv_unified` off), so a sequence's values don't depend on
the place of others in memory: prefill after a restore gives the same bits as prefill after computing the same
prefix. The second is the pool, a unified KV cache, where sequences share the cells of a common prefix; there
a sequence's values may differ in the last bits while others run.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import llama_cpp as lib

from headstart.engine.grammar import Grammars
from headstart.engine.llama.context import LlamaContext, Shape
from headstart.engine.llama.conversion import weights_path
from headstart.engine.llama.embedder import LlamaEmbedder
from headstart.engine.llama.gguf import metadata, open_model
from headstart.engine.llama.pooling import pooling_of
from headstart.engine.llama.sampler import LlamaSampler
from headstart.engine.llama.state_slices import LlamaStateSlices
from headstart.engine.llama.vocabulary import vocabulary
from headstart.engine.logprobs import Logprobs, log_softmax
from headstart.engine.model import LEAST_STEP_TOKENS, ModelError, Piece, Sampler, StateSlices, TooLarge
from headstart.machine import available_bytes, available_cpus, memory_bytes
from headstart.protocol import EngineSettings, ModelInfo, Sampling

if TYPE_CHECKING:
    from headstart.engine.matcher import Matcher

DEFAULT_CTX = 8192
DEFAULT_SLOTS = 4
# The largest share of the machine's memory for the KV cache if the number of slots is chosen here.
KV_MEMORY_SHARE = 1 / 8
KV_VALUE_BYTES = 2
# Bytes of a saved state: per token besides its KV values (position and sequences, twice if the model has two
# KV caches), per layer, and the rest.
CELL_BYTES = 32
LAYER_BYTES = 64
STATE_BYTES = 4096


def _step_tokens(settings: EngineSettings) -> int:
    return max(settings.prefill_chunk, LEAST_STEP_TOKENS)


class LlamaModel:
    """Raises ModelError if the model can't be loaded."""

    def __init__(self, settings: EngineSettings) -> None:
        path = weights_path(settings)
        self.settings = settings
        self.model = open_model(path)
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.ctx = settings.ctx or min(lib.llama_model_n_ctx_train(self.model), DEFAULT_CTX)
        self.slots = settings.slots or self._affordable_slots()
        if settings.within_memory:
            self._check_memory(shares=bool(settings.share_from))
        self.streams = self._context(settings, self.ctx * self.slots, self.slots, streams=True)
        self.pool: LlamaContext | None = None
        if settings.share_from and self.slots > 1 and self.streams.can_cut:
            # A sequence for each slot, one for the shared prefix, and one for `save_from`.
            self.pool = self._context(settings, self.ctx, self.slots + 2, streams=False)
        self.latest = self.streams
        layout, magic = self.streams.layout, self.streams.magic
        known = layout if self.streams.generates else None
        self._slices = LlamaStateSlices(known, magic) if known else None
        self.slices: StateSlices | None = self._slices
        self.grammars = Grammars(partial(vocabulary, self.vocab))
        self.info = self._info(settings, converted=path != settings.path)

    def _context(
        self, settings: EngineSettings, cells: int, sequences: int, *, streams: bool
    ) -> LlamaContext:
        shape = Shape(
            cells=cells,
            sequences=sequences,
            streams=streams,
            batch=_step_tokens(settings) + self.slots,
            threads=settings.threads or available_cpus(),
            flash_attention=bool(settings.numerics.flash_attention),
        )
        return LlamaContext(self.model, shape)

    def _affordable_slots(self) -> int:
        if lib.llama_model_is_recurrent(self.model):
            # A slot takes the same few megabytes for any number of tokens.
            return DEFAULT_SLOTS
        memory = memory_bytes() * KV_MEMORY_SHARE
        contexts = int(memory / (self.ctx * self._kv_token_bytes()))
        # The pool takes as much as a slot, and is useless with a single slot.
        return max(1, min(DEFAULT_SLOTS, contexts - 1 if contexts > 2 else contexts))

    def _check_memory(self, *, shares: bool) -> None:
        """Raises TooLarge. Weights are counted: they are mapped from their file, but must be in memory when
        used."""
        contexts = self.slots + (1 if shares and self.slots > 1 else 0)
        needed = lib.llama_model_size(self.model) + contexts * self.ctx * self._kv_token_bytes()
        if needed > (available := available_bytes()):
            raise TooLarge(
                f"it takes {needed >> 20} MB of memory, and {max(available, 0) >> 20} MB are available"
            )

    def _kv_token_bytes(self) -> int:
        """Bytes of KV cache per token if every layer attends to all tokens; some models take less."""
        heads_kv = int(lib.llama_model_n_head_kv(self.model))
        even = int(lib.llama_model_n_embd(self.model) // max(lib.llama_model_n_head(self.model), 1))
        sizes = [self._metadata(f"attention.{kind}_length") or even for kind in ("key", "value")]
        return int(lib.llama_model_n_layer(self.model)) * max(heads_kv, 1) * sum(sizes) * KV_VALUE_BYTES

    def _state_bytes(self) -> int:
        """Bytes of a saved state that don't depend on its tokens: its header and that of each layer."""
        return STATE_BYTES + int(lib.llama_model_n_layer(self.model)) * LAYER_BYTES

    def _metadata(self, key: str) -> int:
        """A number from the GGUF file under the model's architecture; 0 if there is none."""
        value = metadata(self.model, f"{metadata(self.model, 'general.architecture')}.{key}")
        return int(value) if value.isdigit() else 0

    def _info(self, settings: EngineSettings, *, converted: bool) -> ModelInfo:
        # Recurrent layers have a state of their own, whose size llama.cpp doesn't report in advance.
        attends = not (lib.llama_model_is_recurrent(self.model) or lib.llama_model_is_hybrid(self.model))
        kept = settings.numerics.fingerprinted() | {"kv_type": "f16"}
        if not converted:
            # A file that is Q8_0 already is used as it is.
            kept.pop("weights", None)
        return ModelInfo(
            n_ctx=lib.llama_n_ctx_seq(self.streams.context),
            slots=self.slots,
            can_cut=self.streams.can_cut,
            engine=f"llama-cpp-python {lib.__version__}",
            settings=kept if self.streams.layout else kept | {"kv_streams": str(self.slots)},
            pool_tokens=self.ctx if self.pool else 0,
            step_tokens=_step_tokens(settings),
            state_bytes=self._state_bytes() if attends else 0,
            state_token_bytes=self._kv_token_bytes() + CELL_BYTES if attends else 0,
            generates=self.streams.generates,
            embedding_size=lib.llama_model_n_embd_out(self.model) if pooling_of(self.model) else 0,
            embedding_tokens=self._embedding_tokens(),
        )

    def _embedding_tokens(self) -> int:
        # Encoders have learned positions, and none beyond the training context.
        trained = lib.llama_model_n_ctx_train(self.model)
        return self.ctx if self.streams.generates else min(self.ctx, trained)

    def _place(self, seq: int) -> tuple[LlamaContext, int]:
        """The context of a sequence, and its number there."""
        if seq < self.slots:
            return self.streams, seq
        assert self.pool
        return self.pool, seq - self.slots

    def evaluate(self, pieces: Seq[Piece]) -> None:
        places = [self._place(piece.seq) for piece in pieces]
        self.latest = places[0][0]
        assert all(context is self.latest for context, _ in places)
        self.latest.evaluate([replace(p, seq=seq) for p, (_, seq) in zip(pieces, places, strict=True)])

    def sampler(self, sampling: Sampling, history: Seq[int], matcher: Matcher | None = None) -> LlamaSampler:
        return LlamaSampler(sampling, history, self.vocab, matcher)

    def sample(self, row: int, sampler: Sampler) -> int:
        assert isinstance(sampler, LlamaSampler)
        return sampler.choose(self.latest, row)

    def logprobs(self, row: int) -> Logprobs:
        return log_softmax(self.latest.logits(row))

    def is_end(self, token: int) -> bool:
        return bool(lib.llama_vocab_is_eog(self.vocab, token))

    def clear(self, seq: int) -> None:
        context, number = self._place(seq)
        context.clear(number)

    def cut(self, seq: int, n_tokens: int) -> bool:
        context, number = self._place(seq)
        return context.cut(number, n_tokens)

    def copy(self, source: int, seq: int, n_tokens: int) -> bool:
        (here, number), (there, other) = self._place(seq), self._place(source)
        if here is there and here is self.pool:
            here.share(other, number, 0, n_tokens)
            return True
        return here.restore(number, *there.save(other)) and here.cut(number, n_tokens)

    def relocate(self, seq: int) -> None:
        context, number = self._place(seq)
        context.relocate(number)

    def save(self, seq: int) -> memoryview:
        context, number = self._place(seq)
        memory, start, end = context.save(number)
        return memory[start:end]

    def save_from(self, seq: int, start: int) -> tuple[memoryview, int]:
        context, number = self._place(seq)
        if context is self.streams:
            # llama.cpp has no way to copy a part of a stream.
            return self.save(seq), 0
        spare = self.slots + 1
        context.share(number, spare, start, -1)
        try:
            memory, begin, end = context.save(spare)
        finally:
            context.clear(spare)
        return memory[begin:end], start

    def checkpoint(self, seq: int) -> memoryview:
        context, number = self._place(seq)
        if self._slices is None or not self._slices.has_checkpoint:
            return memoryview(b"")
        return self._slices.second_part(context.second_part(number))

    def restore(self, seq: int, memory: memoryview, start: int, end: int) -> bool:
        context, number = self._place(seq)
        return context.restore(number, memory, start, end)

    def embedder(self) -> LlamaEmbedder:
        pooling = pooling_of(self.model)
        if pooling is None:
            raise ModelError("the model ranks texts")
        needed = self.ctx * self._kv_token_bytes() if self.streams.memory else 0
        if needed > (available := available_bytes()):
            raise TooLarge(f"it takes {needed >> 20} MB of memory, and {available >> 20} MB are available")
        shape = replace(
            self.streams.shape,
            cells=self.ctx,
            sequences=1,
            batch=_step_tokens(self.settings),
            embeddings=True,
        )
        return LlamaEmbedder(self.model, shape, pooling)
