"""Opens regular files only. An untrusted path may lead to anything else: opening a pipe waits forever for its
writer, opening a device may have side effects, and a folder opens but can't be read."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

LARGE = 1 << 30


class NotAFile(OSError):
    """The path does not lead to a regular file."""


def open_file(path: str | Path, *, follow: bool = False) -> BufferedReader:
    """Opens the regular file at the path for reading, without blocking. Symbolic links are followed only with
    `follow`. Raises OSError; NotAFile if the path leads to anything else."""
    look = os.stat if follow else os.lstat
    _check(path, look(path))
    extra = os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)

    def opener(name: str, flags: int) -> int:
        handle = os.open(name, flags | extra)
        try:
            # The file may have been replaced since the first check.
            _check(path, os.fstat(handle))
        except BaseException:
            os.close(handle)
            raise
        return handle

    return open(path, "rb", opener=opener)


def read_bytes(path: str | Path, *, follow: bool = False) -> bytes:
    """Raises OSError."""
    with open_file(path, follow=follow) as file:
        return file.read()


def read_text(path: str | Path, *, follow: bool = False) -> str:
    """Raises OSError or UnicodeDecodeError."""
    return read_bytes(path, follow=follow).decode("utf-8")


def check_written(file: BufferedReader) -> None:
    """Raises OSError for a large file that is mostly holes: it takes no disk space, but can take very long to
    read."""
    size = os.fstat(file.fileno()).st_size
    if size > LARGE and 2 * _written(file.fileno()) < size:
        raise OSError(errno.EINVAL, "most of it was never written", str(file.name))


def _written(handle: int) -> int:
    """The number of bytes of the file that are not holes, as far as its file system reports them."""
    at, written = 0, 0
    with suppress(OSError):
        while True:
            begin = os.lseek(handle, at, os.SEEK_DATA)
            at = os.lseek(handle, begin, os.SEEK_HOLE)
            written += at - begin
    os.lseek(handle, 0, os.SEEK_SET)
    return written


def is_file(path: str | Path, *, follow: bool = False) -> bool:
    """Whether `open_file` would find a regular file there."""
    try:
        return stat.S_ISREG((os.stat if follow else os.lstat)(path).st_mode)
    except (OSError, ValueError):
        return False


def shown(path: str | Path) -> str:
    """The path as printable text, whatever bytes it has."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _check(path: str | Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise NotAFile(errno.EINVAL, f"it is {_kind(found.st_mode)}, not a file", str(path))


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((kind for applies, kind in kinds if applies(mode)), "a device")
