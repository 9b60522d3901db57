"""One llama.cpp context: a KV cache, and evaluation with it.

A sequence's state has the same bytes in every context, whatever the number of its sequences and streams, so
that it can be saved in one and restored in another (`state_layouts.py`). States of an unknown layout stay as
llama.cpp writes them, which is the same for the same number of sequences.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import llama_cpp as lib
import numpy as np

from headstart.engine.llama.attention_part import Bytes
from headstart.engine.llama.gguf import attends_to_everything
from headstart.engine.llama.state_layouts import HEADER, HEADROOM, LENGTH, StateLayout
from headstart.engine.llama.state_memory import state_memory
from headstart.engine.model import ModelError, Piece

# Flags for the second part of a state alone: cells within a window, or of recurrent layers.
PARTIAL = lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY


@dataclass(frozen=True)
class Shape:
    """`cells`: the number of tokens in the KV cache. `streams`: each of the `sequences` has its own part of
    it; else they share all of it. `batch`: the most tokens evaluated at once. `embeddings`: compute each
    token's embedding instead of logits."""

    cells: int
    sequences: int
    streams: bool
    batch: int
    threads: int
    flash_attention: bool
    embeddings: bool = False


class LlamaContext:
    """A context of `model`. Raises ModelError if it can't be created."""

    def __init__(self, model: Any, shape: Shape) -> None:
        self.shape = shape
        self.n_vocab = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)))
        self.context = lib.llama_init_from_model(model, _params(shape))
        if not self.context:
            raise ModelError("llama.cpp can't make a context: too little memory? Try a smaller --ctx")
        self.memory = lib.llama_get_memory(self.context)
        self.batch = lib.llama_batch_init(shape.batch, 0, 1)
        self.sampled_at: list[int] = []
        self.generates = bool(self.memory) and bool(lib.llama_get_causal_attn(self.context))
        empty = self._copy(0)
        self.magic = int(HEADER.unpack_from(empty.data)[0])
        self.layout = self._layout(empty.tobytes())
        self.can_cut = attends_to_everything(model) and self.layout is not None and self.layout.is_plain

    def _layout(self, empty: bytes) -> StateLayout | None:
        n_partial = lib.llama_state_seq_get_size_ext(self.context, 0, PARTIAL)
        return StateLayout.of(empty, n_partial, self.shape.sequences if self.shape.streams else 1)

    def evaluate(self, pieces: Seq[Piece]) -> None:
        # Written through numpy views: a ctypes store per field and token would cost more than the copy.
        n_tokens = sum(len(piece.tokens) for piece in pieces)
        assert 0 < n_tokens <= self.shape.batch
        batch = self.batch
        view = np.ctypeslib.as_array
        tokens, positions = view(batch.token, (n_tokens,)), view(batch.pos, (n_tokens,))
        logits, counts = view(batch.logits, (n_tokens,)), view(batch.n_seq_id, (n_tokens,))
        counts[:] = 1
        logits[:] = self.shape.embeddings
        self.sampled_at = [0] * len(pieces)
        at = 0
        # With streams, llama.cpp evaluates together only sequences with consecutive numbers.
        for row, piece in sorted(enumerate(pieces), key=lambda item: item[1].seq):
            end = at + len(piece.tokens)
            tokens[at:end] = piece.tokens
            positions[at:end] = range(piece.start, piece.start + end - at)
            for i in range(at, end):
                batch.seq_id[i][0] = piece.seq
            logits[end - 1] |= piece.sample
            self.sampled_at[row] = end - 1
            at = end
        batch.n_tokens = n_tokens
        status = lib.llama_decode(self.context, batch)
        if status != 0:
            raise ModelError(f"llama_decode returned {status}")

    def logits(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The logits after piece number `row`; valid until the next evaluation."""
        logits = lib.llama_get_logits_ith(self.context, self.sampled_at[row])
        return np.ctypeslib.as_array(logits, (self.n_vocab,))

    def most_likely(self, row: int) -> int:
        """The most likely token after piece number `row`, the first of equals. Faster than a sampler, which
        first creates a record for each token of the vocabulary."""
        return int(self.logits(row).argmax())

    def close(self) -> None:
        lib.llama_batch_free(self.batch)
        lib.llama_free(self.context)

    def clear(self, seq: int) -> None:
        lib.llama_memory_seq_rm(self.memory, seq, -1, -1)

    def cut(self, seq: int, n_tokens: int) -> bool:
        """Keeps the first `n_tokens` tokens; False, changing nothing, if that is impossible. llama.cpp itself
        would also cut a state of which it has only a window's last cells, and leave a gap."""
        if n_tokens == 0:
            self.clear(seq)
            return True
        if not self.can_cut:
            return bool(lib.llama_memory_seq_pos_max(self.memory, seq) == n_tokens - 1)
        return bool(lib.llama_memory_seq_rm(self.memory, seq, n_tokens, -1))

    def share(self, source: int, seq: int, start: int, end: int) -> None:
        """Fills the cleared `seq` with the tokens from position `start` to `end` (-1: all) of `source`; both
        use the same cells."""
        assert not self.shape.streams
        lib.llama_memory_seq_cp(self.memory, source, seq, start, end)

    def relocate(self, seq: int) -> None:
        """Moves the sequence's cells to where a restore of its state would place them. Raises ModelError,
        leaving unknown values."""
        if self.layout is None or self.layout.is_plain:
            memory, start, end = self.save(seq)
            self.clear(seq)
            moved = self.restore(seq, memory, start, end)
        elif self.layout.window:
            # The cells of layers without a window are there already: a sequence alone fills its stream from
            # the beginning.
            moved = self._read(seq, (second := self._copy(seq, PARTIAL)).data, 0, len(second), partial=True)
        else:
            # Recurrent layers have one cell, wherever it lies.
            moved = True
        if not moved:
            raise ModelError("llama.cpp could not restore its own state")

    def second_part(self, seq: int) -> Bytes:
        """A copy of the second part of the sequence's state in the saved layout; of recurrent models, of all
        but the header. Raises ModelError."""
        assert self.layout
        second = self._copy(seq, PARTIAL)
        start, end = 0, len(second)
        if self.layout.window:
            # Alone it is written like the part of a model without a window.
            plain = replace(self.layout, window=False)
            start, end = plain.saved(second.data, start, end, seq if self.shape.streams else 0, 0)
        return second[start + HEADER.size : end]

    def save(self, seq: int) -> tuple[memoryview, int, int]:
        """A copy of the sequence's state: the memory that holds it, and its start and end there. Raises
        ModelError."""
        memory = self._copy(seq, before=HEADROOM, after=LENGTH.size)
        start, end = HEADROOM, len(memory) - LENGTH.size
        if self.layout:
            partial = lib.llama_state_seq_get_size_ext(self.context, seq, PARTIAL)
            stream = seq if self.shape.streams else 0
            start, end = self.layout.saved(memory.data, start, end, stream, partial - HEADER.size)
        return memory.data, start, end

    def _copy(self, seq: int, flags: int = 0, before: int = 0, after: int = 0) -> Bytes:
        """A copy of the sequence's state, with this many bytes before and after it. Raises ModelError."""
        size = lib.llama_state_seq_get_size_ext(self.context, seq, flags)
        memory = state_memory(before + size + after)
        pointer = _pointer(memory[before:])
        if lib.llama_state_seq_get_data_ext(self.context, pointer, size, seq, flags) != size:
            raise ModelError("llama.cpp could not save the state")
        return memory

    def restore(self, seq: int, memory: memoryview, start: int, end: int) -> bool:
        """Fills a cleared sequence from the state at `start` to `end` of `memory`, overwriting it and up to
        HEADROOM bytes before it; False, leaving unknown values, if it doesn't fit."""
        if end - start < HEADER.size + LENGTH.size:
            return False
        if self.layout is None:
            return self._read(seq, memory, start, end)
        if start < HEADROOM:
            memory = memoryview(bytearray(HEADROOM) + memory[start:end])
            start, end = HEADROOM, len(memory)
        read = [self._read(seq, memory, *reading) for reading in self.layout.readings(memory, start, end)]
        return bool(read) and all(read)

    def _read(self, seq: int, memory: memoryview, start: int, end: int, partial: bool = False) -> bool:
        data = np.frombuffer(memory, dtype=np.uint8, count=end - start, offset=start)
        flags = PARTIAL if partial else 0
        read = lib.llama_state_seq_set_data_ext(self.context, _pointer(data), len(data), seq, flags)
        return bool(read == len(data))


def _pointer(data: np.ndarray[Any, Any]) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _params(shape: Shape) -> Any:
    params = lib.llama_context_default_params()
    params.n_ctx = shape.cells
    params.n_batch = params.n_ubatch = shape.batch
    params.n_seq_max = shape.sequences
    params.n_threads = params.n_threads_batch = shape.threads
    params.flash_attn_type = int(shape.flash_attention)
    params.kv_unified = not shape.streams
    params.embeddings = shape.embeddings
    if shape.embeddings:
        params.pooling_type = lib.LLAMA_POOLING_TYPE_NONE
    # Layers with a sliding window keep only the window. More would take memory for each slot, only to allow
    # cutting computed states: a restored one has no more than the window.
    params.swa_full = False
    return params
