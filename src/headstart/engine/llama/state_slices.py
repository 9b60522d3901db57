"""Cuts saved states into blocks of tokens and puts them together again.

A block is an attention part (`attention_part.py`) of its tokens, in the order of their positions, as of
sequence 0. A checkpoint is the second part of a saved state, or, of recurrent models, all of it but its
header. So what is put together has the bytes that llama.cpp would have saved for sequence 0.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from headstart.engine.llama.attention_part import AttentionPart, Bytes, count_in
from headstart.engine.llama.state_layouts import COUNT, HEADER, HEADROOM, LENGTH, StateLayout
from headstart.engine.llama.state_memory import state_memory
from headstart.engine.model import ModelError


class LlamaStateSlices:
    """For states of a known layout. `magic`: the number at their beginning."""

    def __init__(self, layout: StateLayout, magic: int) -> None:
        self.layout = layout
        self.magic = magic
        self.has_cells = layout.attention
        self.has_checkpoint = not layout.is_plain

    def n_cells(self, state: memoryview) -> int:
        return count_in(self._parts(state)[0]) if self.has_cells else 0

    def cut(self, state: memoryview, start: int, end: int) -> memoryview:
        if not self.has_cells:
            return memoryview(b"")
        memory, _ = self._parts(state)
        if not 0 <= start <= end <= count_in(memory):
            raise ModelError("a state has fewer tokens than are to be cut from it")
        if start == end:
            return memoryview(COUNT.pack(0))
        part = AttentionPart.read(memory)
        block = AttentionPart.new(
            np.empty(part.shape.size(end - start), dtype=np.uint8), part.shape, end - start
        )
        order = _order(part.positions)
        if order is None:
            block.fill([(part, start, end)])
        else:
            block.gather(part, order[start:end])
        block.forget_sequence()
        return block.memory.data

    def checkpoint(self, state: memoryview) -> memoryview:
        return self.second_part(self._parts(state)[1]) if self.has_checkpoint else memoryview(b"")

    def second_part(self, memory: Bytes) -> memoryview:
        """A copy of the second part of a state in the form of a checkpoint."""
        memory = memory.copy()
        if self.layout.window:
            self._window(memory).forget_sequence()
        return memory.data

    def join(
        self, blocks: Seq[memoryview], n_tokens: int, checkpoint: memoryview
    ) -> tuple[memoryview, int, int]:
        second = _bytes(checkpoint)
        self._check(second, n_tokens)
        parts = self._read(blocks, n_tokens) if self.has_cells else []
        at = HEADROOM + HEADER.size
        n_first = COUNT.size + parts[0].shape.size(n_tokens) if parts else 0
        n_length = LENGTH.size if self.layout.has_two_parts else 0
        memory = state_memory(at + n_first + len(second) + n_length)
        HEADER.pack_into(memory.data, HEADROOM, self.magic, 0)
        if parts:
            COUNT.pack_into(memory.data, at, 1)
            _fill(memory[at + COUNT.size : at + n_first], parts, n_tokens)
        memory[at + n_first : at + n_first + len(second)] = second
        if n_length:
            LENGTH.pack_into(memory.data, len(memory) - n_length, len(second))
        return memory.data, HEADROOM, len(memory)

    def _read(self, blocks: Seq[memoryview], n_tokens: int) -> list[AttentionPart]:
        """As many blocks as have these tokens. Raises ModelError if there are fewer, or of other shapes."""
        parts: list[AttentionPart] = []
        missing = n_tokens
        for block in blocks:
            if missing <= 0:
                break
            memory = _bytes(block)
            if count_in(memory) == 0:
                continue
            parts.append(AttentionPart.read(memory))
            missing -= parts[-1].n_cells
        if missing > 0 or not parts:
            raise ModelError("the blocks have fewer tokens than the state")
        if any(part.shape != parts[0].shape for part in parts):
            raise ModelError("the blocks are of different models")
        return parts

    def _check(self, second: Bytes, n_tokens: int) -> None:
        """Raises ModelError unless this is the checkpoint after `n_tokens` tokens. llama.cpp checks the
        contents of recurrent ones."""
        if not self.has_checkpoint:
            last = n_tokens - 1 if not len(second) else None
        elif self.layout.window:
            last = int(self._window(second).positions.max())
        else:
            cells, last = np.frombuffer(_begin(second, 8), dtype="<i4").tolist()
            last = last if cells == 1 else None
        if last != n_tokens - 1:
            raise ModelError("a checkpoint is of another place")

    def _window(self, second: Bytes) -> AttentionPart:
        if COUNT.unpack(_begin(second, COUNT.size))[0] != 1:
            raise ModelError("a checkpoint is of more than one stream")
        return AttentionPart.read(second[COUNT.size :])

    def _parts(self, state: memoryview) -> tuple[Bytes, Bytes]:
        """The attention part of a saved state, empty without one, and the second part."""
        memory = _bytes(state)
        if HEADER.unpack(_begin(memory, HEADER.size))[0] != self.magic:
            raise ModelError("this is no state of llama.cpp")
        at, end = HEADER.size, len(memory)
        if not self.has_cells:
            return memory[:0], memory[at:]
        if COUNT.unpack(_begin(memory[at:], COUNT.size))[0] != 1:
            raise ModelError("a state is of more than one stream")
        at += COUNT.size
        if not self.layout.has_two_parts:
            return memory[at:], memory[:0]
        end -= LENGTH.size
        if end < at or (split := end - LENGTH.unpack_from(memory.data, end)[0]) < at:
            raise ModelError("a state ends early")
        return memory[at:split], memory[split:end]


def _fill(memory: Bytes, parts: Seq[AttentionPart], n_tokens: int) -> None:
    """Writes the first `n_tokens` tokens of the parts as one part."""
    whole = AttentionPart.new(memory, parts[0].shape, n_tokens)
    counts = [part.n_cells for part in parts]
    counts[-1] -= sum(counts) - n_tokens
    whole.fill([(part, 0, n) for part, n in zip(parts, counts, strict=True)])
    if not np.array_equal(whole.positions, np.arange(n_tokens)):
        raise ModelError("the blocks are not consecutive")


def _order(positions: NDArray[np.int32]) -> NDArray[np.intp] | None:
    """The cells in the order of their positions; None if that is the order they have."""
    first = int(positions.min())
    wanted = np.arange(first, first + len(positions))
    if np.array_equal(positions, wanted):
        return None
    order = np.argsort(positions, kind="stable")
    if not np.array_equal(positions[order], wanted):
        raise ModelError("a state has gaps")
    return order


def _bytes(memory: memoryview) -> Bytes:
    return np.frombuffer(memory, dtype=np.uint8)


def _begin(memory: Bytes, n_bytes: int) -> bytes:
    if len(memory) < n_bytes:
        raise ModelError("a state ends early")
    return memory[:n_bytes].tobytes()
