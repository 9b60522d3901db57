"""Decides which blocks are written to the disk, and which are deleted there to make room."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from headstart.engine.states.block import Block
from headstart.engine.states.disk import DiskTier

if TYPE_CHECKING:
    from headstart.engine.states.store import StateStore

# Shorter prompts are not written.
LEAST_WRITTEN = 32


class WriteBehind:
    """Used from the engine's thread. A block is written after those before it, and once."""

    def __init__(self, store: StateStore, disk: DiskTier) -> None:
        self.store = store
        self.disk = disk

    def write(self, block: Block) -> bool:
        """Begins to write a block, after those before it; False if it may not be written."""
        if not self.disk.is_ready:
            return False
        path = block.path()
        missing = [each for each in path if each.file is None and each not in self.disk.writing]
        if not all(each.to_disk and each.in_memory for each in missing):
            return False
        if not self.make_room(sum(map(self.disk.size_of, missing)), path):
            return False
        for each in missing:
            self.disk.write(each)
        return True

    def set_limit(self, n_bytes: int) -> None:
        self.disk.limit = n_bytes
        self.make_room(0)

    def make_room(self, n_bytes: int, kept: Collection[Block] = ()) -> bool:
        """Makes room for so many bytes by deleting blocks, ends of chains first, those of least worth first,
        none of the `kept` ones; False if that is impossible."""
        if n_bytes > self.disk.limit:
            return False
        missing = self.disk.n_bytes + n_bytes - self.disk.limit
        if missing <= 0:
            return True
        spared = set(kept)
        for block in self.store.least_worth(lambda block: block.file is not None):
            if missing <= 0:
                break
            if block.file is None or block in spared or block.pins or any(c.file for c in block.children):
                continue
            missing -= block.file.size
            self.store.evictions += 1
            if block.in_memory:
                self.disk.remove(block)
                self.disk.refused.add(block)
            else:
                self.store.remove(block)
        return missing <= 0

    def write_all(self, blocks: Iterable[Block]) -> None:
        """Begins to write all blocks that may be written and aren't."""
        for block in blocks:
            if block.file or block.gone or block in self.disk.writing or block in self.disk.refused:
                continue
            is_short = block.end < LEAST_WRITTEN and not block.children
            if is_short or not self.write(block):
                self.disk.refused.add(block)
        self.disk.touch_used()

    def outstanding(self, blocks: Iterable[Block]) -> bool:
        """Whether `write_all` has something to do."""
        passed = self.disk.refused | self.disk.writing.keys()
        return bool(self.disk.used) or any(
            block.file is None and block.to_disk and block not in passed for block in blocks
        )
