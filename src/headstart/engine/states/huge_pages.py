"""Memory in huge pages, which takes a third of the time to fill: most of it goes into finding new pages."""

from __future__ import annotations

import mmap
from contextlib import suppress


def new_memory(size: int) -> mmap.mmap:
    """Private memory, given back as soon as nothing refers to it; in usual pages where the system has no huge
    ones. Raises OSError if there is too little."""
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
