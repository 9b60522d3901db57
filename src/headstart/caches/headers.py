"""The known caches, as read from the headers of their files.

A file's header, which is hashed, is authoritative about its cache. If it can't be read, its copy
(`header_copies.py`) is used, with a warning, until the file can be read again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from msgspec.structs import replace

from headstart.caches.cache_file import format
from headstart.caches.cache_file.format import Corrupt, identity_of
from headstart.caches.cache_file.header_copies import Copies
from headstart.caches.cache_file.sidecar import CACHE_SUFFIX
from headstart.caches.entry import Entry, Identity
from headstart.caches.files import identity_at
from headstart.names import CacheKey, Namespace

log = logging.getLogger(__name__)


class Catalog:
    """The caches in the cache directory `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.copies = Copies(directory)
        self._entries: dict[CacheKey, Entry] = {}
        self._from_copies: set[CacheKey] = set()

    def path(self, key: CacheKey) -> Path:
        assert key.is_valid, key
        return self.directory / key.namespace / (key.name + CACHE_SUFFIX)

    def on_disk(self) -> Iterator[CacheKey]:
        """Keys of the files that may be caches."""
        for path in self.directory.glob(f"*/*{CACHE_SUFFIX}"):
            key = CacheKey(Namespace(path.parent.name), path.name.removesuffix(CACHE_SUFFIX))
            if key.is_valid:
                yield key

    def caches(self) -> set[CacheKey]:
        return set(self._entries)

    def get(self, key: CacheKey) -> Entry | None:
        """The entry as last read."""
        return self._entries.get(key)

    def all(self) -> Iterable[Entry]:
        """All entries as last read."""
        return self._entries.values()

    def is_from_copy(self, key: CacheKey) -> bool:
        """Whether the file's header could not be read, so that the entry comes from its copy."""
        return key in self._from_copies

    def tell_of_copy(self, entry: Entry) -> None:
        """Says so if a cache that is written anew has the text of a copy."""
        known = self.get(entry.key)
        if known and self.is_from_copy(known.key) and known.content == entry.content:
            log.warning("%s: written anew with the unverified text of the copy", self.path(entry.key))

    def look(self, key: CacheKey) -> Entry | None:
        """Reads the entry from the disk; None if there is no file. A damaged file keeps the entry of its
        header, or the one last read, so that its state can be rebuilt; verification will refuse it."""
        path, known = self.path(key), self._entries.get(key)
        try:
            identity = identity_of(path.lstat())
        except (FileNotFoundError, NotADirectoryError):
            self.forget(key)
            return None
        except OSError as error:
            log.warning("%s can't be read: %s", path, error)
            return known
        if known and known.identity == identity and key not in self._from_copies:
            return known
        try:
            entry = format.read(path)
        except (Corrupt, OSError) as error:
            log.warning("damaged cache file: %s", error)
            if salvaged := format.salvaged(path):
                self.remember(salvaged)
            return salvaged or known or self._recall(key, identity)
        if entry.key != key:
            log.warning("%s holds the cache %s of %s: ignored", path, entry.name, entry.namespace)
            self.forget(key)
            return None
        self.remember(entry)
        return entry

    def _recall(self, key: CacheKey, identity: Identity) -> Entry | None:
        if not (entry := self.copies.read(key)):
            return None
        log.warning("%s: using unverified text from the copy of its header", self.path(key))
        self._from_copies.add(key)
        self._entries[key] = entry = replace(entry, identity=identity)
        return entry

    def remember(self, entry: Entry) -> None:
        """Stores an entry that was read from its file or written to it."""
        key = entry.key
        self._from_copies.discard(key)
        self._entries[key] = entry
        self.copies.keep(key, self.path(key))

    def forget(self, key: CacheKey) -> None:
        self._from_copies.discard(key)
        if self._entries.pop(key, None):
            self.copies.delete(key)

    def take_over(self, earlier: Iterable[Entry]) -> None:
        """Creates header copies from an earlier release's index for caches whose files can't be read."""
        for entry in earlier:
            key = entry.key
            if key.is_valid and key not in self._entries and identity_at(self.path(key)):
                log.warning("%s: using unverified text from an earlier release's index", self.path(key))
                self.copies.put(entry)
                self.look(key)


def is_same(entry: Entry | None, other: Entry) -> bool:
    """Whether they are the same cache, even if its file was damaged in between."""
    return entry is not None and _lasting(entry) == _lasting(other)


def _lasting(entry: Entry) -> Entry:
    """The entry without the fields that damage can change."""
    return replace(entry, identity=(0, 0, 0, 0), forms={}, evicted=[])
