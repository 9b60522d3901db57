"""Memory for states, used again.

Pages that the kernel has to find and clear take longer than copying a state into them: on a virtual machine
2.8 GB/s, against 8.7 GB/s into pages that are there already. So memory that nothing refers to any more is
kept, but left to the kernel (MADV_FREE), which takes the pages when it needs them.
"""

from __future__ import annotations

import mmap
import weakref

import numpy as np
from numpy.typing import NDArray

from headstart.engine.states.huge_pages import new_memory

# Less is left to the usual allocator.
LEAST_BYTES = 1 << 20
# One for a state that is saved, and one for a state that is restored.
MOST_KEPT = 2

_kept: list[mmap.mmap] = []


def state_memory(n_bytes: int) -> NDArray[np.uint8]:
    """An array with arbitrary content."""
    if n_bytes < LEAST_BYTES:
        return np.empty(n_bytes, dtype=np.uint8)
    # In steps of an eighth to a quarter, so that a state that grows fits what a smaller one was given: pages
    # that aren't touched cost nothing.
    step = 1 << (n_bytes.bit_length() - 3)
    size = -(-n_bytes // step) * step
    mapping = _again(size) or _new(size)
    array = np.frombuffer(mapping, dtype=np.uint8, count=n_bytes)
    # All views of the array refer to it, so it goes last.
    weakref.finalize(array, _keep, mapping).atexit = False
    return array


def _again(size: int) -> mmap.mmap | None:
    for mapping in _kept.copy():
        if size <= len(mapping) <= 2 * size:
            try:
                _kept.remove(mapping)
            except ValueError:
                # Another thread took it.
                continue
            return mapping
    return None


def _new(size: int) -> mmap.mmap:
    try:
        return new_memory(size)
    except OSError as error:
        raise MemoryError(f"no memory for {size} bytes") from error


def _keep(mapping: mmap.mmap) -> None:
    try:
        mapping.madvise(mmap.MADV_FREE)
    except OSError:
        return
    _kept.append(mapping)
    if len(_kept) > MOST_KEPT:
        del _kept[0]
