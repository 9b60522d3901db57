"""Reads and writes files that hold the state of a sequence."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

from blake3 import blake3

from headstart.protocol import SaveTo, StateRef
from headstart.regular_files import open_file

READ_BYTES = 4 << 20
# The disk is full, or the user's quota or the limit on file sizes (ulimit -f) is reached.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# mincore defines only the lowest bit of each page's byte.
LOWEST_BIT = bytes(number & 1 for number in range(256))


@contextmanager
def mapped(state: StateRef) -> Iterator[mmap.mmap]:
    """Maps the whole file; writes to the mapping never reach the file. Raises OSError, also if the file is
    not the verified one."""
    with open_file(state.path) as file:
        stat = os.fstat(file.fileno())
        if (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) != state.identity:
            raise OSError(errno.ESTALE, "another file than the one that was verified")
        if not 0 <= state.offset < state.offset + state.nbytes <= stat.st_size:
            raise OSError(errno.EINVAL, "the state is not within the file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
            yield mapping


def is_in_memory(state: StateRef) -> bool:
    """Whether the page cache has the whole state, so that reading it doesn't wait for the disk. Raises
    OSError."""
    with mapped(state) as mapping:
        begin = state.offset // mmap.PAGESIZE * mmap.PAGESIZE
        return resident_pages(mapping, begin, state.offset + state.nbytes)[1] == 0


def resident_pages(mapping: mmap.mmap, begin: int, end: int) -> tuple[int, int]:
    """The numbers of pages between `begin` (a page's start) and `end` of a writable mapping that are in
    memory and that are not, by mincore; if the system doesn't report it, none are counted as in memory."""
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
    """Reads the state once, so that the page cache has it. Unlike touching the pages of a mapping, this lets
    other threads run while it waits. Raises OSError."""
    buffer = bytearray(READ_BYTES)
    with open_file(state.path) as file:
        at, end = state.offset, state.offset + state.nbytes
        while at < end and (n := os.preadv(file.fileno(), [memoryview(buffer)[: end - at]], at)):
            at += n


def write(place: SaveTo, state: memoryview) -> str:
    """Writes the state, syncs it to the disk, and returns its BLAKE3 hash. Raises OSError. The file must
    exist: if the requester has removed it, none is created."""
    found = blake3(state).hexdigest()
    with os.fdopen(os.open(place.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "wb") as file:
        file.seek(place.offset)
        file.write(state)
        file.flush()
        os.fdatasync(file.fileno())
    return found
