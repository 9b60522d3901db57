"""A cache file with a new header and the same states.

The old file is never changed, so its readers are not disturbed. The kernel copies the states without reading
or hashing them here (their hashes are copied too, so damage stays detectable). If the file system can share
extents and the new header fits into the old space, no data is copied at all.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

from headstart.caches.cache_file import format
from headstart.caches.cache_file.header import BESIDE, HASH, LENGTH, Corrupt, hashed, header_text, read_header
from headstart.caches.cache_file.writer import CacheWriter, room_for
from headstart.caches.entry import Entry
from headstart.regular_files import NotAFile

CHUNK = 8 << 20
# Errors of a kernel or file system that can't copy between these files by itself.
UNABLE = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def rewrite(source: Path, target: Path, entry: Entry) -> Entry:
    """Writes into the empty file `target` the states of `source` under the header of `entry`, and syncs.
    Returns the entry as stored. If the header of `source` can't be read any more, its states are unusable:
    `target` gets none. Raises OSError."""
    try:
        return _rewrite(source, target, entry)
    except (Corrupt, FileNotFoundError, NotAFile):
        return write_stub(target, entry)


def write_stub(target: Path, entry: Entry) -> Entry:
    """Writes into the empty file `target` the cache without its states. Raises OSError."""
    stub = entry.without_states()
    return CacheWriter(target, stub, {}).finish(stub)


def _rewrite(source: Path, target: Path, entry: Entry) -> Entry:
    with format.open_file(source) as old, target.open("r+b", buffering=0) as new:
        header = read_header(old)
        start = header.start
        hashes = {
            name: value for name, value in header.metadata.items() if name.startswith((f"{HASH} ", BESIDE))
        }
        text = header_text(entry, header.tensors, hashes)
        room = start - LENGTH.size
        if len(text) > room:
            room = room_for(len(text))
            new.seek(LENGTH.size + room)
        else:
            # Copies from the start, because file systems share only whole blocks.
            start = 0
        _copy(old, start, new)
        text = hashed(text.ljust(room))
        os.pwrite(new.fileno(), LENGTH.pack(room) + text, 0)
        os.fsync(new.fileno())
    return format.read(target)


def _copy(old: BinaryIO, start: int, new: BinaryIO) -> None:
    """Copies `old` from `start` on to the current position of `new`."""
    end = os.fstat(old.fileno()).st_size
    while start < end:
        n = _copy_some(old.fileno(), start, new.fileno(), min(end - start, CHUNK))
        if n == 0:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        start += n


def _copy_some(old: int, start: int, new: int, size: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(old, new, size, start)
        except OSError as error:
            if error.errno not in UNABLE:
                raise
    view = memoryview(os.pread(old, size, start))
    written = 0
    while written < len(view):
        written += os.write(new, view[written:])
    return written
