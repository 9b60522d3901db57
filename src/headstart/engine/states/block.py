"""A block: the values of a run of tokens, computed once, never changed."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headstart.engine.states.block_file import BlockFile

# The most tokens of a block, unless a single chunk of prefill has more.
BLOCK_TOKENS = 256
# A use counts half after this time.
HALF_LIFE_SECONDS = 86400.0


@dataclass(eq=False, slots=True)
class Block:
    """`tokens` from position `start` on, after those of `parent`; the root of a tree has none of both.

    `owner`: who may use it; "": everybody. `cuts`: the positions up to its end where prefill was cut, the
    last of which is its end; negative where prefill made a checkpoint and went on from that. Then its values
    are exact: any prefill with these cuts computes the same bits. None: its values were decoded or computed
    in a batch with others, and no other computation gives the same bits; `run` tells them from others.

    `data`, the values of its tokens, and `checkpoint`, what belongs to its end alone, are None when they are
    not in memory. `file`: where both are on the disk. `n_data`, `n_checkpoint`: their sizes in bytes.
    `to_disk`: it may be written. `lasting`: so may its checkpoint. `cost_ms`: the time that computing it
    takes. `pins`: the number of sequences about to start from it. `gone`: it is no longer in the tree."""

    parent: Block | None = None
    start: int = 0
    tokens: array[int] = field(default_factory=lambda: array("i"))
    owner: str = ""
    cuts: tuple[int, ...] | None = ()
    run: str = ""
    address: str = ""
    children: list[Block] = field(default_factory=list)
    data: memoryview | None = None
    checkpoint: memoryview | None = None
    file: BlockFile | None = None
    n_data: int = 0
    n_checkpoint: int = 0
    to_disk: bool = True
    lasting: bool = True
    cost_ms: float = 0.0
    uses: int = 0
    last_used: float = 0.0
    pins: int = 0
    gone: bool = False

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def parent_address(self) -> str:
        """The address of the block before; "" for a first block."""
        return self.parent.address if self.parent and self.parent.parent else ""

    @property
    def in_memory(self) -> bool:
        return self.data is not None

    @property
    def memory_bytes(self) -> int:
        return (0 if self.data is None else self.n_data) + (
            0 if self.checkpoint is None else self.n_checkpoint
        )

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint at its end, in memory or on the disk."""
        return self.checkpoint is not None or (
            self.file is not None and self.file.header.checkpoint_bytes > 0
        )

    def path(self) -> list[Block]:
        """The blocks from the first one to this, without the root."""
        found: list[Block] = []
        block: Block = self
        while block.parent:
            found.append(block)
            block = block.parent
        return found[::-1]

    def at_most(self, n_tokens: int) -> Block:
        """The last block of its path that ends at or before `n_tokens` and is still in the tree."""
        block: Block = self
        while block.parent and (block.gone or block.end > n_tokens):
            block = block.parent
        return block

    def subtree(self) -> Iterator[Block]:
        """This block and all that continue it, each after its parent."""
        waiting: list[Block] = [self]
        while waiting:
            block = waiting.pop()
            yield block
            waiting += block.children

    def worth(self, now: float) -> float:
        """Milliseconds of computation saved per byte, by the formula of `caches/eviction.py`: each use makes
        another one likelier, the less so the longer ago the last one was."""
        fading = math.pow(0.5, max(now - self.last_used, 0.0) / HALF_LIFE_SECONDS)
        n_bytes = max(self.n_data + self.n_checkpoint, 1)
        return max(self.cost_ms, 1e-3 * len(self.tokens)) / n_bytes * (1 + self.uses) * fading
