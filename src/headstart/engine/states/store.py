"""The state store of one model: a tree of blocks, in memory up to a limit, on the disk up to another."""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import monotonic, time

from headstart.engine.model import StateSlices
from headstart.engine.states.block import Block
from headstart.engine.states.disk import DiskTier, ReadBlocks
from headstart.engine.states.held import Held, Segment, segments
from headstart.engine.states.removal import ends_first, forgotten
from headstart.engine.states.tree import Lookup, Match, longest, same_block
from headstart.engine.states.write_behind import WriteBehind

log = logging.getLogger(__name__)

# A copy of a state whose first cell is token `first`, at most the given token, and `first`.
SaveFrom = Callable[[int], tuple[memoryview, int]]
# Of checkpoints that are not in regular places, a chain keeps so many in memory.
RECENT_CHECKPOINTS = 3


class StateStore:
    """Used from the engine's thread. `memory_limit`: bytes; what is being written to the disk counts until it
    is written. `disk` None: there is none. `cost_ms`: the time to compute tokens from the first to the second
    position. `days`: what is unused for longer is removed; 0: never."""

    def __init__(
        self,
        slices: StateSlices,
        memory_limit: int,
        disk: DiskTier | None = None,
        cost_ms: Callable[[int, int], float] = lambda start, end: float(end - start),
        days: float = 0,
    ) -> None:
        self.slices = slices
        self.memory_limit = memory_limit
        self.disk = disk
        self.cost_ms = cost_ms
        self.days = days
        self.root = Block(address=disk.root if disk else "")
        self.writes = WriteBehind(self, disk) if disk else None
        self.memory_bytes = 0
        self.evictions = 0
        self.parked = 0
        self.park_ms = 0.0
        # Bytes of the whole states that were copied out of slots.
        self.parked_bytes = 0
        self.given_up = 0
        self.verify_failures = 0
        if disk:
            self._adopt(disk.open())

    def blocks(self) -> Iterator[Block]:
        """All blocks, each after its parent."""
        return (block for child in self.root.children for block in child.subtree())

    def find(self, lookup: Lookup) -> Match | None:
        """The longest stored prefix of a prompt."""
        return longest(self.root, lookup)

    def pin(self, match: Match, n: int) -> None:
        """Adds `n`, 1 or -1, to the number of sequences that are about to start from these blocks: they stay
        in memory."""
        for block in match.blocks:
            block.pins += n

    def use(self, match: Match) -> None:
        """Records a use of these blocks."""
        self._touch(match.block, n_uses=1)

    def load(self, match: Match) -> tuple[memoryview, int, int]:
        """The state of the match, whose blocks must be in memory, for `Model.restore`. Raises ModelError."""
        checkpoint = match.block.checkpoint
        if checkpoint is None or not self.slices.has_checkpoint:
            checkpoint = memoryview(b"")
        data = [block.data for block in match.blocks if block.data is not None]
        return self.slices.join(data, match.n_tokens, checkpoint)

    def accept(self, loaded: ReadBlocks) -> None:
        """Takes what was read from the disk; removes damaged blocks and what continues them."""
        for block, content in loaded.found:
            if block.gone:
                continue
            if isinstance(content, Exception):
                log.warning("a stored state is damaged and was removed: %s", content)
                self.verify_failures += 1
                self.remove(block)
                continue
            self._put(block, *content)

    def park(self, held: Held, base: Block | None, save_from: SaveFrom) -> Block:
        """Keeps what a slot holds; `base`: the block up to which it is stored already. Returns the block at
        its end, or the last one before what isn't kept. Raises ModelError."""
        started = monotonic()
        block = base.at_most(len(held.tokens)) if base else self.root
        tokens = array("i", held.tokens)
        left = list(segments(held, block.end))
        while left and (found := same_block(block, left[0], tokens)):
            block = found
            taken = held.checkpoints.get(block.end)
            if taken and block.data is not None and not block.has_checkpoint:
                self._put(block, block.data, taken.data)
            del left[0]
        if left:
            block = self._add(block, left, tokens, held, save_from)
            self.parked += 1
            self.park_ms += 1000 * (monotonic() - started)
        self._touch(block)
        self.shrink()
        return block.at_most(len(tokens))

    def _add(
        self, parent: Block, left: Sequence[Segment], tokens: array[int], held: Held, save_from: SaveFrom
    ) -> Block:
        state, first = save_from(left[0].start)
        self.parked_bytes += len(state)
        run = os.urandom(8).hex()
        for segment in left:
            block = Block(
                parent=parent,
                start=segment.start,
                tokens=tokens[segment.start : segment.end],
                owner=segment.owner,
                cuts=segment.cuts,
                run="" if segment.cuts else run,
                to_disk=held.to_disk and parent.to_disk,
                cost_ms=self.cost_ms(segment.start, segment.end),
            )
            taken = held.checkpoints.get(segment.end)
            part = taken.data if taken else None
            if segment.end == len(tokens) and self.slices.has_checkpoint:
                part = self.slices.checkpoint(state)
            block.lasting = taken is None or taken.lasting
            parent.children.append(block)
            self._put(block, self.slices.cut(state, segment.start - first, segment.end - first), part)
            parent = block
        if self.slices.has_checkpoint:
            self._thin(parent)
        return parent

    def _put(self, block: Block, data: memoryview, checkpoint: memoryview | None) -> None:
        self.memory_bytes -= block.memory_bytes
        block.data, block.n_data = data, len(data)
        if checkpoint is not None and len(checkpoint):
            block.checkpoint, block.n_checkpoint = checkpoint, len(checkpoint)
        self.memory_bytes += block.memory_bytes

    def _thin(self, last: Block) -> None:
        """Drops old checkpoints of a chain that are not in regular places."""
        occasional = [block for block in last.path() if block.checkpoint is not None and not block.lasting]
        for block in occasional[:-RECENT_CHECKPOINTS]:
            self._drop_checkpoint(block)

    def _drop_checkpoint(self, block: Block) -> None:
        self.memory_bytes -= block.n_checkpoint
        block.checkpoint = None
        if not block.has_checkpoint:
            block.n_checkpoint = 0

    def _touch(self, last: Block, n_uses: int = 0) -> None:
        now = time()
        for block in last.path():
            block.last_used = now
            block.uses += n_uses
            if self.disk and block.file:
                self.disk.used.add(block)

    def set_limits(self, memory_limit: int, disk_limit: int) -> None:
        self.memory_limit = memory_limit
        if self.writes:
            self.writes.set_limit(disk_limit)
        self.shrink()

    def shrink(self) -> None:
        """Brings the memory tier within its limit: removes what is on the disk, has the rest written if it
        may be, or else evicts it, from the ends of chains, what is worth least first."""
        self.settle()
        excess = self.memory_bytes - self.memory_limit
        if excess <= 0:
            return
        if self.disk:
            excess -= self.disk.writing_bytes
        for block in self.least_worth(lambda block: block.in_memory):
            if excess <= 0:
                return
            is_needed = block.pins or any(child.in_memory for child in block.children)
            if is_needed or (self.disk and block in self.disk.writing):
                continue
            excess -= block.memory_bytes
            if block.file:
                self._drop(block)
            elif not (self.writes and self.writes.write(block)):
                self.remove(block)
                self.evictions += 1

    def least_worth(self, holds: Callable[[Block], bool]) -> Iterator[Block]:
        """The blocks that a tier holds, those of least worth first, each after all that continue it there."""
        now = time()
        return ends_first([block for block in self.blocks() if holds(block)], lambda block: block.worth(now))

    def _drop(self, block: Block) -> None:
        """Removes a block that is on the disk from memory."""
        assert block.file
        self.memory_bytes -= block.memory_bytes
        block.data = block.checkpoint = None
        block.n_checkpoint = block.file.header.checkpoint_bytes

    def forget(self, owner: str | None, tokens: Sequence[int] | None, kept: Sequence[Sequence[int]]) -> int:
        """Removes the blocks of a prompt beyond what it has in common with a `kept` one, and all that
        continue them, for good; `owner` and `tokens` None: of all owners, of all prompts. Returns their
        number."""
        found = forgotten(self.root.children, owner, tokens, kept)
        n = sum(map(self.remove, found))
        if self.disk:
            self.disk.wait_written()
            self.settle()
            self.disk.sync()
        return n

    def remove(self, block: Block) -> int:
        """Removes a block and all that continue it from both tiers; returns their number."""
        if block.gone:
            return 0
        removed = list(block.subtree())
        for each in removed:
            self.memory_bytes -= each.memory_bytes
            each.data = each.checkpoint = None
            each.gone = True
            if self.disk:
                self.disk.remove(each)
        if block.parent:
            block.parent.children.remove(block)
        return len(removed)

    def write_behind(self) -> None:
        """Has everything written that may be and isn't, and removes what has not been used for too long; for
        idle moments."""
        self.settle()
        if self.days:
            # A block was used whenever one that continues it was.
            oldest = time() - 86400 * self.days
            for block in [each for each in self.blocks() if each.last_used < oldest]:
                self.remove(block)
        if self.disk and not self.disk.is_ready:
            self._adopt(self.disk.open())
        elif self.writes:
            self.writes.write_all(list(self.blocks()))

    @property
    def unwritten(self) -> bool:
        """Whether `write_behind` has something to do."""
        if not self.writes or not self.writes.disk.limit:
            return False
        return not self.writes.disk.is_ready or self.writes.outstanding(self.blocks())

    def settle(self) -> None:
        """Records what has been written."""
        if self.disk:
            self.disk.settle()

    def close(self, seconds: float) -> None:
        """Writes everything that may be, for at most so many seconds."""
        self.write_behind()
        if self.disk:
            self.disk.close(seconds)
            self.settle()

    def _adopt(self, files: Iterable[Block]) -> None:
        """Takes the blocks that the disk holds into the tree, each after its parent."""
        known = {block.address: block for block in self.blocks() if block.address}
        for block in files:
            parent_address = block.file.header.parent if block.file else ""
            parent = known.get(parent_address) if parent_address else self.root
            if parent is None or block.address in known or parent.end != block.start:
                continue
            block.parent = parent
            block.cost_ms = self.cost_ms(block.start, block.end)
            parent.children.append(block)
            known[block.address] = block

    @property
    def counts(self) -> object:
        """Changes whenever the report does."""
        disk = self.disk
        on_disk = (disk.n_bytes, disk.failures, len(disk.writing)) if disk else None
        return self.memory_bytes, self.evictions, self.parked, self.given_up, self.verify_failures, on_disk

    @property
    def is_writing(self) -> bool:
        return bool(self.disk and self.disk.writing)
