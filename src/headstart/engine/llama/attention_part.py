"""The part of a state for attention, as llama.cpp writes it for one sequence.

    u32 cells
    for each cell:  i32 position, u32 1 (the number of sequences), i32 sequence
    u32 whether V is transposed, u32 layers
    for each layer: i32 type of K, u64 bytes of a row, a row for each cell
    for each layer: i32 type of V, u64 bytes of a row, a row for each cell
      transposed:   i32 type of V, u32 bytes of an element, u32 columns, a column of cells' elements for each

Cells of models with positions in several dimensions have three more numbers before the sequence. A part
without cells ends after the first number. Layers that use another's values aren't written; models with latent
attention have no V. Nothing read here is trusted: every count and size is checked against the memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.engine.model import ModelError

COUNT = struct.Struct("<I")
FLAG_AND_LAYERS = struct.Struct("<II")
ROWS = struct.Struct("<iQ")
COLUMNS = struct.Struct("<iII")
HEAD_BYTES = 12
assert ROWS.size == COLUMNS.size == HEAD_BYTES
# Bytes of a cell, without and with a position in several dimensions.
CELL_BYTES = (12, 24)
# llama.cpp's own limit is 512.
MOST_LAYERS = 1024

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Tensor:
    """The values of a layer, K or V: `columns` runs of `unit` bytes for each cell. `head`: what is written
    before them."""

    head: bytes
    columns: int
    unit: int

    @classmethod
    def of(cls, head: bytes, *, transposed: bool) -> Tensor:
        if transposed:
            _, element, columns = COLUMNS.unpack(head)
            return cls(head, columns, element)
        return cls(head, 1, ROWS.unpack(head)[1])

    def size(self, n_cells: int) -> int:
        return HEAD_BYTES + self.columns * self.unit * n_cells


@dataclass(frozen=True)
class PartShape:
    """What all parts of a model have in common, whatever the number of their cells."""

    cell_bytes: int
    transposed: bool
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @cached_property
    def runs(self) -> list[tuple[Tensor, int]]:
        """The tensors in order, equal ones together with their number."""
        return [(tensor, len(list(run))) for tensor, run in groupby(self.keys + self.values)]

    def start(self, n_cells: int) -> int:
        """The offset of the first tensor."""
        return COUNT.size + n_cells * self.cell_bytes + FLAG_AND_LAYERS.size

    def size(self, n_cells: int) -> int:
        return self.start(n_cells) + sum(count * tensor.size(n_cells) for tensor, count in self.runs)


class AttentionPart:
    """A part in `memory`, whose values are views of it."""

    def __init__(self, memory: Bytes, shape: PartShape, n_cells: int) -> None:
        self.memory = memory
        self.shape = shape
        self.n_cells = n_cells

    @classmethod
    def read(cls, memory: Bytes) -> AttentionPart:
        """Raises ModelError if the memory isn't exactly one part with cells."""
        n_cells = count_in(memory)
        for cell_bytes in CELL_BYTES:
            shape = _shape(memory, n_cells, cell_bytes)
            if shape:
                return cls(memory, shape, n_cells)
        raise ModelError("this is no state of attention")

    @classmethod
    def new(cls, memory: Bytes, shape: PartShape, n_cells: int) -> AttentionPart:
        """Writes everything but cells and values to memory of `shape.size(n_cells)` bytes."""
        assert len(memory) == shape.size(n_cells)
        part = cls(memory, shape, n_cells)
        COUNT.pack_into(memory.data, 0, n_cells)
        at = shape.start(n_cells)
        FLAG_AND_LAYERS.pack_into(memory.data, at - FLAG_AND_LAYERS.size, shape.transposed, len(shape.keys))
        for tensor, count in shape.runs:
            strides = (tensor.size(n_cells), 1)
            heads = _view(memory, at, (count, HEAD_BYTES), strides)
            heads[:] = np.frombuffer(tensor.head, dtype=np.uint8)
            at += count * tensor.size(n_cells)
        return part

    @property
    def cells(self) -> Bytes:
        """The bytes of each cell."""
        width = self.shape.cell_bytes
        return self.memory[COUNT.size :][: self.n_cells * width].reshape(-1, width)

    @property
    def positions(self) -> NDArray[np.int32]:
        return np.ascontiguousarray(self.cells[:, :4]).view("<i4")[:, 0]

    def forget_sequence(self) -> None:
        """Makes the cells those of sequence 0."""
        self.cells[:, -4:] = 0

    def values(self) -> Iterator[tuple[int, Bytes]]:
        """For each run of equal tensors the bytes of a cell in a column, and the values of all its cells, by
        tensor and column."""
        at, n = self.shape.start(self.n_cells), self.n_cells
        for tensor, count in self.shape.runs:
            column, size = n * tensor.unit, tensor.size(n)
            dimensions, strides = (count, tensor.columns, column), (size, column, 1)
            yield tensor.unit, _view(self.memory, at + HEAD_BYTES, dimensions, strides)
            at += count * size

    def fill(self, sources: Seq[tuple[AttentionPart, int, int]]) -> None:
        """Copies the cells from a start to an end of each of these parts of the same shape, one after the
        other."""
        at = 0
        for source, start, end in sources:
            self.cells[at : at + end - start] = source.cells[start:end]
            at += end - start
        runs = zip(self.values(), *(source.values() for source, _, _ in sources), strict=True)
        for (unit, mine), *theirs in runs:
            # One tensor after the other: with all at once for each source, the processor has to find more
            # pages than it remembers (3.0 instead of 4.3 GB/s).
            for number, tensor in enumerate(mine):
                at = 0
                for (_, values), (_, start, end) in zip(theirs, sources, strict=True):
                    to = at + (end - start) * unit
                    tensor[:, at:to] = values[number, :, start * unit : end * unit]
                    at = to

    def gather(self, source: AttentionPart, cells: NDArray[np.intp]) -> None:
        """Copies these cells of a part of the same shape, in this order."""
        self.cells[:] = source.cells[cells]
        for (unit, mine), (_, theirs) in zip(self.values(), source.values(), strict=True):
            places = (cells[:, None] * unit + np.arange(unit)).ravel()
            for number, tensor in enumerate(mine):
                tensor[:] = theirs[number][:, places]


def count_in(memory: Bytes) -> int:
    """The number of cells of a part."""
    if len(memory) < COUNT.size:
        raise ModelError("a state ends early")
    return int(COUNT.unpack_from(memory.data)[0])


def _shape(memory: Bytes, n_cells: int, cell_bytes: int) -> PartShape | None:
    """The shape of a part with cells of this size; None if there is no such part in the memory."""
    at, end = COUNT.size + n_cells * cell_bytes, len(memory)
    if n_cells == 0 or at + FLAG_AND_LAYERS.size > end:
        return None
    counts = _view(memory, COUNT.size + 4, (n_cells, 4), (cell_bytes, 1))
    transposed, n_layers = FLAG_AND_LAYERS.unpack_from(memory.data, at)
    if not (counts == np.array([1, 0, 0, 0])).all() or transposed > 1 or n_layers > MOST_LAYERS:
        return None
    at += FLAG_AND_LAYERS.size
    tensors: list[Tensor] = []
    while at < end and len(tensors) < 2 * n_layers:
        if at + HEAD_BYTES > end:
            return None
        by_column = bool(transposed) and len(tensors) >= n_layers
        tensors.append(Tensor.of(memory[at : at + HEAD_BYTES].tobytes(), transposed=by_column))
        at += tensors[-1].size(n_cells)
    if at != end or len(tensors) not in (n_layers, 2 * n_layers):
        return None
    return PartShape(cell_bytes, bool(transposed), tuple(tensors[:n_layers]), tuple(tensors[n_layers:]))


def _view(memory: Bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    return np.ndarray(shape, dtype=np.uint8, buffer=memory, offset=offset, strides=strides)
