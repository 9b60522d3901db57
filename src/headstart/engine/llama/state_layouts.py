"""The layout of a state, and its conversion to one that is the same for any number of sequences and streams.

llama.cpp writes a sequence's state as u32 magic, i32 sequence, then a part for each memory of the model:

    attention:  u32 streams, u32 cells of stream 0, [cells], u32 cells of stream 1, ...
    recurrent:  u32 cells, [cells]

Full attention has one part of the first kind. A sliding window adds another: it belongs to the layers with
the window, and holds the window's last cells only. Hybrid models have a part of each kind, recurrent ones
only the second. In the state of one sequence all streams but one are empty. The saved layout is that of
sequence 0 of one stream; if there are two parts, the length of the second (u64) follows. Reading puts the
empty streams first, which llama.cpp accepts for any sequence.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

# The number of bytes before a state that reading it may overwrite.
HEADROOM = 4 * 64
HEADER = struct.Struct("<Ii")
COUNT = struct.Struct("<I")
LENGTH = struct.Struct("<Q")
# Start, end, and whether it is what llama.cpp calls a partial state: the second part alone.
Reading = tuple[int, int, bool]


@dataclass(frozen=True)
class StateLayout:
    """The layout of states in a context with `streams` streams: the flags say whether there is a part for
    attention, a second one for attention within a window, and one for recurrent layers."""

    streams: int
    attention: bool
    window: bool = False
    recurrent: bool = False

    @classmethod
    def of(cls, empty: bytes, n_partial: int, streams: int) -> StateLayout | None:
        """The layout by the state of a sequence without tokens and the length of its partial state; None if
        it is unknown."""
        words = [word for (word,) in COUNT.iter_unpack(empty[HEADER.size :])]
        part = [streams] + [0] * streams
        second = words[len(part) :]
        if words == part:
            return cls(streams, attention=True)
        if words[:1] == [0] and n_partial == len(empty):
            return cls(streams, attention=False, recurrent=True)
        if words[: len(part)] != part or n_partial != HEADER.size + COUNT.size * len(second):
            return None
        if second == part:
            return cls(streams, attention=True, window=True)
        return cls(streams, attention=True, recurrent=True) if second[:1] == [0] else None

    @property
    def is_plain(self) -> bool:
        """Whether states have a single part, whose cells are tokens."""
        return not (self.window or self.recurrent)

    @property
    def has_two_parts(self) -> bool:
        return self.attention and not self.is_plain

    def saved(self, memory: memoryview, start: int, end: int, stream: int, n_second: int) -> tuple[int, int]:
        """Converts the state of the sequence in a stream, whose second part takes `n_second` bytes, to the
        saved layout, and returns its start and end. There must be room for a LENGTH after the state."""
        magic, _ = HEADER.unpack_from(memory, start)
        # The number of bytes for empty streams before and after the sequence's own.
        before, after = COUNT.size * stream, COUNT.size * (self.streams - 1 - stream)
        if self.has_two_parts:
            split = end - n_second
            first, last = (split + before, end - after) if self.window else (split, end)
            n_second = last - first
            split -= after
            memory[split : split + n_second] = memory[first:last]
            if self.window:
                COUNT.pack_into(memory, split, 1)
            LENGTH.pack_into(memory, split + n_second, n_second)
            end = split + n_second + LENGTH.size
        elif self.attention:
            end -= after
        if self.attention:
            start += before
            COUNT.pack_into(memory, start + HEADER.size, 1)
        HEADER.pack_into(memory, start, magic, 0)
        return start, end

    def readings(self, memory: memoryview, start: int, end: int) -> Iterator[Reading]:
        """The parts of a saved state to pass to llama.cpp, in this order, each after the one before was read;
        none if it is no such state. The state and up to HEADROOM bytes before it are overwritten."""
        magic, _ = HEADER.unpack_from(memory, start)
        split = end
        if self.has_two_parts:
            end -= LENGTH.size
            split = end - LENGTH.unpack_from(memory, end)[0]
        if not self.attention or self.streams == 1:
            yield start, end, False
            return
        own = start + HEADER.size + COUNT.size
        if not own < split or COUNT.unpack_from(memory, own - COUNT.size)[0] != 1:
            return
        first = self._begin(memory, own, magic)
        if not self.window:
            yield first, end, False
            return
        # There is no room for more streams between the parts. So the first is read with an empty part after
        # it, which temporarily overwrites the second; then the second alone, its header over the first's end.
        none = COUNT.pack(self.streams) + bytes(COUNT.size * self.streams)
        covered = bytes(memory[split : split + len(none)])
        memory[split : split + len(none)] = none
        yield first, split + len(none), False
        memory[split : split + len(none)] = covered
        yield self._begin(memory, split + COUNT.size, magic), end, True

    def _begin(self, memory: memoryview, own: int, magic: int) -> int:
        """Writes the bytes before the cells of the last stream, which begin at `own`, and returns their
        start."""
        start = own - HEADER.size - COUNT.size * self.streams
        HEADER.pack_into(memory, start, magic, 0)
        COUNT.pack_into(memory, start + HEADER.size, self.streams)
        memory[start + HEADER.size + COUNT.size : own] = bytes(COUNT.size * (self.streams - 1))
        return start
