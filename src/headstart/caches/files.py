"""File operations of the store, independent of content."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headstart.caches.cache_file.format import identity_of
from headstart.caches.entry import Identity
from headstart.errors import StartupError, StorageError, StorageFull
from headstart.regular_files import check_written, open_file

log = logging.getLogger(__name__)

# No space: on the disk, in the user's quota, or under the file size limit (ulimit -f).
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def identity_at(path: Path) -> Identity | None:
    """The file's identity; None if it can't be read."""
    try:
        return identity_of(path.lstat())
    except OSError:
        return None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file. Raises OSError, also for a large file that is mostly holes."""
    with open_file(path, follow=True) as file:
        check_written(file)
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """Returns when renames and removals in the directory are on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def take_lock(directory: Path) -> int:
    """Locks the directory against other servers; returns the handle that holds the lock until it is closed.
    Raises StartupError if another server holds it, or OSError."""
    try:
        lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        # The disk is mounted read-only: its caches can be used, and no process writes.
        log.warning("%s can't be written: no cache can be created or deleted", directory)
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise StartupError(
            f"Another Headstart server uses the cache directory {directory}. Stop it, or start "
            "this one with another --cache-dir."
        ) from None
    return lock


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turns OSError into StorageFull or StorageError about `what`."""
    try:
        yield
    except OSError as error:
        kind = StorageFull if error.errno in NO_ROOM else StorageError
        raise kind(f"Can't write {what}: {error.strerror or error}") from error
