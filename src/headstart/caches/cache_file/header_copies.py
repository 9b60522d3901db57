"""Copies of the headers of cache files, for a file whose own header can't be read any more.

    <directory>/<namespace>/<name>.header

A copy is identical to the beginning of the file, so the hash in it is checked in the same way. It is used
only if the file's own header can't be read. All copies can be deleted: a start creates them again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path

from headstart.caches.cache_file import format
from headstart.caches.cache_file.format import LENGTH, MAX_HEADER, Corrupt
from headstart.caches.entry import Entry
from headstart.names import CacheKey, Namespace

log = logging.getLogger(__name__)

# No model can have this name, so it never collides with a model's directory.
DIRECTORY = ".headers"
SUFFIX = ".header"
SCRATCH = ".scratch"


class Copies:
    """The header copies in the cache directory `directory`. If one can't be written, it is left out and the
    first failure is logged: a copy is needed only if a file is damaged later."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / DIRECTORY
        self._was_told = False

    def _path(self, key: CacheKey) -> Path:
        return self.directory / key.namespace / (key.name + SUFFIX)

    def keep(self, key: CacheKey, path: Path) -> None:
        """Copies the header of the file at `path`, unless the copy is up to date."""
        try:
            self._write(self._path(key), _header(path))
        except OSError as error:
            self._failed(key, error)

    def put(self, entry: Entry) -> None:
        """Writes a header with the entry but without its states."""
        text = format.hashed(format.header_text(entry.without_states(), {}, {}))
        try:
            self._write(self._path(entry.key), LENGTH.pack(len(text)) + text)
        except OSError as error:
            self._failed(entry.key, error)

    def _write(self, copy: Path, header: bytes) -> None:
        if _holds(copy, header):
            return
        for folder in (self.directory, copy.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        # Always the same name: after an interruption at most one is left.
        scratch = copy.with_name(SCRATCH)
        scratch.unlink(missing_ok=True)
        try:
            with os.fdopen(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as output:
                output.write(header)
            scratch.rename(copy)
        finally:
            scratch.unlink(missing_ok=True)

    def _failed(self, key: CacheKey, error: OSError) -> None:
        if not self._was_told:
            log.warning("headers of caches can't be copied to %s: %s", self.directory, error)
        self._was_told = True
        # An older version's copy must not be taken for this one's.
        self.delete(key)

    def read(self, key: CacheKey) -> Entry | None:
        """The entry in the copy; None without an intact copy."""
        try:
            entry = format.read(self._path(key), whole=False)
        except (Corrupt, OSError):
            return None
        return entry if entry.key == key else None

    def delete(self, key: CacheKey) -> None:
        _delete(self._path(key))

    def keep_only(self, caches: Collection[CacheKey]) -> None:
        """Deletes the copies of all other caches."""
        if self.directory.is_symlink():
            # The files behind a link are not ours to delete.
            return
        for path in self.directory.glob("*/*"):
            key = CacheKey(Namespace(path.parent.name), path.name.removesuffix(SUFFIX))
            if path.name == SCRATCH or (path.suffix == SUFFIX and key not in caches):
                _delete(path)


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("the copy of a header can't be deleted: %s", error)


def _holds(copy: Path, header: bytes) -> bool:
    try:
        with format.open_file(copy) as opened:
            return opened.read(len(header) + 1) == header
    except OSError:
        return False


def _header(path: Path) -> bytes:
    """The header of a file that was just checked; readers of the copy check its hash. Raises OSError."""
    with format.open_file(path) as opened:
        start = opened.read(LENGTH.size)
        length = LENGTH.unpack(start)[0] if len(start) == LENGTH.size else MAX_HEADER
        return start + opened.read(min(length, MAX_HEADER))
