"""One llama.cpp context: a KV cache and what is computed with it.

A sequence's state has the same bytes in every context, whatever the number of its sequences and streams, so
that it can be saved in one and restored in another. llama.cpp's own form differs in its first numbers only:

    u32 magic, i32 sequence, u32 streams, u32 cells of stream 0, [cells], u32 cells of stream 1, ...

With one sequence all streams but one are empty. Saved here is the form for sequence 0 of one stream: magic,
0, 1, cells, [cells]. Reading puts the empty streams first, which llama.cpp accepts for any sequence. Models
with another kind of memory (sliding window, recurrent, hybrid) nest these numbers deeper; their states stay
as they are.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import llama_cpp as lib
import numpy as np

from headstart.engine.model import ModelError, Piece

HEADER = struct.Struct("<IiI")
# Bytes before a state that `restore` may overwrite.
HEADROOM = 4 * 64


@dataclass(frozen=True)
class Shape:
    """`cells`: tokens the KV cache holds in all. `streams`: each of the `sequences` has its own part of it;
    else they share all of it. `batch`: tokens evaluated at once."""

    cells: int
    sequences: int
    streams: bool
    batch: int
    threads: int
    flash_attention: bool


class LlamaContext:
    """Raises ModelError when it can't be made."""

    def __init__(self, model: Any, shape: Shape, *, plain_states: bool) -> None:
        self.shape = shape
        self.plain_states = plain_states
        self.n_streams = shape.sequences if shape.streams else 1
        self.n_vocab = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)))
        self.context = lib.llama_init_from_model(model, _params(shape))
        if not self.context:
            raise ModelError("llama.cpp can't make a context: too little memory? Try a smaller --ctx")
        self.memory = lib.llama_get_memory(self.context)
        self.batch = lib.llama_batch_init(shape.batch, 0, 1)
        self.sampled_at: list[int] = []

    def evaluate(self, pieces: Seq[Piece]) -> None:
        # Written through numpy views: a ctypes store a field a token would cost more than the copy.
        n_tokens = sum(len(piece.tokens) for piece in pieces)
        assert 0 < n_tokens <= self.shape.batch
        batch = self.batch
        view = np.ctypeslib.as_array
        tokens, positions = view(batch.token, (n_tokens,)), view(batch.pos, (n_tokens,))
        logits, counts = view(batch.logits, (n_tokens,)), view(batch.n_seq_id, (n_tokens,))
        counts[:] = 1
        logits[:] = 0
        self.sampled_at = [0] * len(pieces)
        at = 0
        # With streams llama.cpp evaluates together only sequences whose numbers follow each other.
        for row, piece in sorted(enumerate(pieces), key=lambda item: item[1].seq):
            end = at + len(piece.tokens)
            tokens[at:end] = piece.tokens
            positions[at:end] = range(piece.start, piece.start + end - at)
            for i in range(at, end):
                batch.seq_id[i][0] = piece.seq
            logits[end - 1] = piece.sample
            self.sampled_at[row] = end - 1
            at = end
        batch.n_tokens = n_tokens
        status = lib.llama_decode(self.context, batch)
        if status != 0:
            raise ModelError(f"llama_decode returned {status}")

    def most_likely(self, row: int) -> int:
        """The token after piece number `row`; the first of several. Faster than a sampler, which makes a
        record of each token of the vocabulary first."""
        logits = lib.llama_get_logits_ith(self.context, self.sampled_at[row])
        return int(np.ctypeslib.as_array(logits, (self.n_vocab,)).argmax())

    def clear(self, seq: int) -> None:
        lib.llama_memory_seq_rm(self.memory, seq, -1, -1)

    def cut(self, seq: int, n_tokens: int) -> bool:
        return bool(lib.llama_memory_seq_rm(self.memory, seq, n_tokens, -1))

    def share(self, source: int, seq: int, n_tokens: int) -> None:
        """`seq`, cleared, begins with the first `n_tokens` tokens of `source`; both use the same cells."""
        assert not self.shape.streams
        lib.llama_memory_seq_cp(self.memory, source, seq, 0, n_tokens)

    def save(self, seq: int) -> tuple[memoryview, int, int]:
        """Memory with a copy of the sequence's state, which lies from the first to the second of the numbers.
        Raises ModelError."""
        size = lib.llama_state_seq_get_size(self.context, seq)
        memory = np.empty(HEADROOM + size, dtype=np.uint8)
        if lib.llama_state_seq_get_data(self.context, _pointer(memory[HEADROOM:]), size, seq) != size:
            raise ModelError("llama.cpp could not save the state")
        view, start, end = memory.data, HEADROOM, len(memory)
        if self.plain_states:
            magic, _, _ = HEADER.unpack_from(view, start)
            if self.n_streams > 1:
                start, end = start + 4 * seq, end - 4 * (self.n_streams - 1 - seq)
            HEADER.pack_into(view, start, magic, 0, 1)
        return view, start, end

    def restore(self, seq: int, memory: memoryview, start: int, end: int) -> bool:
        """Fills a cleared sequence from the state at `start` to `end` of `memory`, of which up to HEADROOM
        bytes before it are overwritten; False, leaving unknown values, if it doesn't fit."""
        if end - start < HEADER.size:
            return False
        if self.plain_states and self.n_streams > 1:
            if start < HEADROOM:
                memory = memoryview(bytearray(HEADROOM) + memory[start:end])
                start, end = HEADROOM, len(memory)
            magic, _, n_streams = HEADER.unpack_from(memory, start)
            if n_streams != 1:
                return False
            others = self.n_streams - 1
            start -= 4 * others
            struct.pack_into(f"<IiI{others}I", memory, start, magic, 0, self.n_streams, *[0] * others)
        data = np.frombuffer(memory, dtype=np.uint8, count=end - start, offset=start)
        read: int = lib.llama_state_seq_set_data(self.context, _pointer(data), len(data), seq)
        return read == len(data)


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
    return params
