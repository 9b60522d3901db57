"""Files that hold a sequence's state, as the engine reads and writes them."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

from blake3 import blake3

from headstart.protocol import SaveTo, StateRef
from headstart.regular_files import opened

READ_BYTES = 4 << 20
# The disk, the user's quota, or the size that the system lets a file have (ulimit -f).
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of what mincore says of a page only the lowest bit counts.
LOWEST_BIT = bytes(number & 1 for number in range(256))


@contextmanager
def mapped(state: StateRef) -> Iterator[mmap.mmap]:
    """The whole file. What is written to the mapping never reaches it. Raises OSError, also when the file is
    not the one that was verified."""
    with opened(state.path) as file:
        stat = os.fstat(file.fileno())
        if (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) != state.identity:
            raise OSError(errno.ESTALE, "another file than the one that was verified")
        if not 0 <= state.offset < state.offset + state.nbytes <= stat.st_size:
            raise OSError(errno.EINVAL, "the state is not within the file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
            yield mapping


def is_in_memory(state: StateRef) -> bool:
    """Whether the page cache has all of the state, so that reading it waits for no disk. Raises OSError."""
    with mapped(state) as mapping:
        begin = state.offset // mmap.PAGESIZE * mmap.PAGESIZE
        return resident_pages(mapping, begin, state.offset + state.nbytes)[1] == 0


def resident_pages(mapping: mmap.mmap, begin: int, end: int) -> tuple[int, int]:
    """How many pages between two places of a writable mapping, the first at a page's start, are in memory and
    how many are not, by mincore; none are said to be where the system doesn't tell."""
    pages = -(-(end - begin) // mmap.PAGESIZE)
    vector = (ctypes.c_ubyte * pages)()
    first = ctypes.c_char.from_buffer(mapping, begin)
    mincore = ctypes.CDLL(None).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    status = mincore(ctypes.addressof(first), end - begin, vector)
    del first
    resident = bytes(vector).translate(LOWEST_BIT).count(1) if status == 0 else 0
    return resident, pages - resident


def bring_into_memory(state: StateRef) -> None:
    """Reads the state once, so that the page cache has it. Unlike touching the pages of a mapping this lets
    other threads run while it waits. Raises OSError."""
    buffer = bytearray(READ_BYTES)
    with opened(state.path) as file:
        at, end = state.offset, state.offset + state.nbytes
        while at < end and (n := os.preadv(file.fileno(), [memoryview(buffer)[: end - at]], at)):
            at += n


def write(place: SaveTo, state: memoryview) -> str:
    """Returns when the state is on the disk, with its BLAKE3 hash. Raises OSError. The file must exist: if
    whoever asked for it has removed it, nothing is left behind."""
    found = blake3(state).hexdigest()
    with os.fdopen(os.open(place.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "wb") as file:
        file.seek(place.offset)
        file.write(state)
        file.flush()
        os.fdatasync(file.fileno())
    return found
