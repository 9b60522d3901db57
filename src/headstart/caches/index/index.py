"""The index: usage figures of caches, and hashes of weights files.

The open index is held in memory. A thread writes changes to `index.sqlite`, so that no request waits for the
disk or another process's lock; what can't be written now is written later. The index contains no content of
caches.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from headstart.caches.entry import Entry, Identity
from headstart.caches.index.records import RecordKey, Records, is_damage
from headstart.caches.index.usage import USAGE, CacheUsage, usage_key
from headstart.names import CacheKey

log = logging.getLogger(__name__)

WEIGHTS = "weights"
UNUSED = CacheUsage()


class WeightsRecord(Struct, frozen=True):
    """The SHA-256 of a model file, and the file's identity at that time."""

    identity: Identity
    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


Record = CacheUsage | WeightsRecord
TYPES: dict[str, type[Record]] = {USAGE: CacheUsage, WEIGHTS: WeightsRecord}


class Index:
    """Used from one thread. `earlier`: the unchecked entries of an earlier release's index."""

    def __init__(self, path: Path) -> None:
        self.earlier: list[Entry] = []
        self._path = path
        self._records = Records(path)
        self._known: dict[RecordKey, Record] = {}
        # Changes to write; None deletes the record.
        self._changes: dict[RecordKey, Record | None] = {}
        # Held only while memory is changed.
        self._guard = Lock()
        self._was_open = False
        self._was_told = False
        self._is_due = False
        self._is_closed = False
        self._write()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="index")

    def close(self) -> None:
        """Writes outstanding changes, if possible."""
        self.save()
        self._is_closed = True
        self._writer.shutdown()
        self._records.close()

    def save(self) -> None:
        """Starts writing all changes; doesn't wait for it."""
        is_wanted = self._changes or self._records.must_wipe or not self._was_open
        if is_wanted and not (self._is_due or self._is_closed):
            self._is_due = True
            self._writer.submit(self._write)

    def flush(self) -> None:
        """Returns when earlier changes were written or could not be."""
        self._writer.submit(self._write).result()

    def _write(self) -> None:
        self._is_due = False
        try:
            try:
                self._write_changes()
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
                # Another process has changed or replaced it under a running server.
                log.warning("the index %s is damaged (%s)", self._path, error)
                self._records.close()
                self._write_changes()
        except (sqlite3.Error, OSError) as error:
            if not self._was_told:
                log.warning("the index %s can't be used (%s): usage is not remembered", self._path, error)
            self._was_told = True
        else:
            if self._was_told:
                log.info("the index %s can be used again", self._path)
            self._was_told = False

    def _write_changes(self) -> None:
        if not self._records.is_open:
            self._open()
        with self._guard:
            changes, self._changes = self._changes, {}
        try:
            self._records.write({key: _encoded(record) for key, record in changes.items()})
        except BaseException:
            with self._guard:
                self._changes = changes | self._changes
            raise

    def _open(self) -> None:
        """Opens the database. The first time, its records are added to those counted since the start."""
        # An earlier release's entries are only of use at a start.
        earlier = self._records.open(migrate=not self._was_told)
        try:
            found = {} if self._was_open else self._read()
        except sqlite3.Error:
            self._records.close()
            raise
        self.earlier = self.earlier or earlier
        with self._guard:
            if self._was_open:
                self._changes = {**self._known, **self._changes}
            for key, record in found.items():
                self._merge(key, record)
            self._was_open = True

    def _read(self) -> dict[RecordKey, Record]:
        found: dict[RecordKey, Record] = {}
        for kind, key, value in self._records.all():
            try:
                found[kind, key] = msgspec.json.decode(value, type=TYPES[kind])
            except (KeyError, msgspec.MsgspecError) as error:
                log.warning("a record of the index is ignored: %s", error)
        return found

    def _merge(self, key: RecordKey, record: Record) -> None:
        since = self._known.get(key)
        if isinstance(since, CacheUsage) and isinstance(record, CacheUsage):
            self._known[key] = self._changes[key] = record.plus(since)
        elif since is None and key not in self._changes:
            self._known[key] = record

    def _put(self, key: RecordKey, record: Record) -> None:
        self._known[key] = self._changes[key] = record

    def usage(self, key: CacheKey) -> CacheUsage:
        found = self._known.get(usage_key(key))
        return found if isinstance(found, CacheUsage) else UNUSED

    def used(self, key: CacheKey, when: float, tokens: int, seconds: float) -> None:
        """Counts a hit."""
        with self._guard:
            hit = CacheUsage(1, when, tokens, seconds)
            self._put(usage_key(key), self.usage(key).plus(hit))
        self.save()

    def touch(self, key: CacheKey, when: float) -> None:
        """Records a use that is not a hit."""
        with self._guard:
            self._put(usage_key(key), self.usage(key).plus(CacheUsage(last_used=when)))
        self.save()

    def delete(self, key: CacheKey) -> None:
        """Deletes the usage of the cache."""
        self._delete(usage_key(key))

    def _delete(self, key: RecordKey) -> None:
        with self._guard:
            # Also one not read yet because the database could not be opened.
            if self._known.pop(key, None) or not self._was_open:
                self._changes[key] = None
        self.save()

    def keep_only(self, caches: Collection[CacheKey]) -> None:
        """Deletes the usage of all other caches."""
        kept = set(map(usage_key, caches))
        for key in [key for key in self._known if key[0] == USAGE and key not in kept]:
            self._delete(key)

    def expires_at(self, entry: Entry) -> float | None:
        """When the cache expires, in seconds since 1970; None: never. The lifetime of an automatic cache
        counts from its last use."""
        if entry.expires is None or entry.origin != "automatic":
            return entry.expires
        last = self.usage(entry.key).last_used or 0.0
        return entry.expires + max(last - entry.updated, 0.0)

    def is_expired(self, entry: Entry, now: float) -> bool:
        return (expires_at := self.expires_at(entry)) is not None and expires_at <= now

    def weights_hash(self, path: str, identity: Identity) -> str | None:
        known = self._known.get((WEIGHTS, path))
        return known.sha256 if isinstance(known, WeightsRecord) and known.identity == identity else None

    def put_weights_hash(self, path: str, identity: Identity, sha256: str) -> None:
        with self._guard:
            self._put((WEIGHTS, path), WeightsRecord(identity, sha256))
        self.save()


def _encoded(record: Record | None) -> bytes | None:
    return None if record is None else msgspec.json.encode(record)
