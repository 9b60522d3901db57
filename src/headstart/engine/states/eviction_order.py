"""The order in which blocks of a tier are given up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from heapq import heapify, heappop, heappush
from time import time

from headstart.engine.states.block import Block


def least_worth(blocks: Iterable[Block], holds: Callable[[Block], bool]) -> Iterator[Block]:
    """The blocks that a tier `holds`, those of least worth first, each after all that continue it there."""
    now = time()
    n_after = {block: sum(map(holds, block.children)) for block in blocks if holds(block)}
    ends = [(block.worth(now), id(block), block) for block, n in n_after.items() if n == 0]
    heapify(ends)
    while ends:
        _, _, block = heappop(ends)
        parent = block.parent
        yield block
        if parent in n_after:
            assert parent
            n_after[parent] -= 1
            if n_after[parent] == 0:
                heappush(ends, (parent.worth(now), id(parent), parent))
