"""The SQLite index: entries as last seen, how often they were used, and hashes of weights files.

Everything in it but the usage figures can be had from the files again; a database that isn't one any more is
replaced by a new one. Where the disk is full or can't be written, the index is kept in memory for as long as
the server runs, and what is on the disk stays as it is.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from headstart.caches.entry import Entry, Identity

log = logging.getLogger(__name__)

SCHEMA = """
DROP TABLE IF EXISTS caches;
CREATE TABLE IF NOT EXISTS entries (
    shelf TEXT NOT NULL, name TEXT NOT NULL, entry BLOB NOT NULL,
    hits INTEGER NOT NULL DEFAULT 0, last_used REAL,
    tokens_saved INTEGER NOT NULL DEFAULT 0, seconds_saved REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (shelf, name)
);
CREATE TABLE IF NOT EXISTS weights (path TEXT PRIMARY KEY, identity TEXT NOT NULL, sha256 TEXT NOT NULL);
"""
# What entries did not have at first.
LATER = {
    "tokens_saved": "INTEGER NOT NULL DEFAULT 0",
    "seconds_saved": "REAL NOT NULL DEFAULT 0",
}
# What SQLite says of a database that the disk has no room for, or that it may not open or write now.
# Extended codes have one of these in their lowest byte.
UNUSABLE = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY,
}


@dataclass(frozen=True)
class Usage:
    """How often a cache was used, when last, and what its hits saved: tokens that needed no evaluation, and
    the time this would have taken beyond that of restoring them."""

    hits: int = 0
    last_used: float | None = None
    tokens_saved: int = 0
    seconds_saved: float = 0.0


class Index:
    """Used from one thread."""

    def __init__(self, path: Path) -> None:
        try:
            self.database = self._open(path)
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in UNUSABLE:
                self.database = self._in_memory(path, error)
                return
            log.warning("the index %s can't be read (%s): making a new one", path, error)
            for file in path.parent.glob(path.name + "*"):
                file.unlink()
            self.database = self._open(path)
        except OSError as error:
            self.database = self._in_memory(path, error)

    def _in_memory(self, path: Path, error: Exception) -> sqlite3.Connection:
        log.warning("the index %s can't be used (%s): usage is not remembered", path, error)
        return self._connected(":memory:")

    def _open(self, path: Path) -> sqlite3.Connection:
        path.touch(mode=0o600)
        return self._connected(path)

    @staticmethod
    def _connected(path: Path | str) -> sqlite3.Connection:
        database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.executescript(SCHEMA)
        present = {row[1] for row in database.execute("PRAGMA table_info(entries)")}
        for column in LATER.keys() - present:
            database.execute(f"ALTER TABLE entries ADD COLUMN {column} {LATER[column]}")
        (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        return database

    def close(self) -> None:
        self.database.close()

    def _write(self, statement: str, values: Sequence[object]) -> None:
        """An index that can't be written, on a full disk say, is behind the files, which is no error."""
        try:
            self.database.execute(statement, values)
        except sqlite3.Error as error:
            log.warning("the index can't be written: %s", error)

    def _row(self, statement: str, values: Sequence[object]) -> Sequence[Any] | None:
        """None also where the index can't be read any more."""
        try:
            row: Sequence[Any] | None = self.database.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            log.warning("the index can't be read: %s", error)
            return None
        return row

    def entries(self) -> list[Entry]:
        """Those that can be read; one written by another version of the program is read from its file."""
        found = []
        for (blob,) in self.database.execute("SELECT entry FROM entries"):
            try:
                found.append(msgspec.json.decode(blob, type=Entry))
            except msgspec.MsgspecError:
                continue
        return found

    def put(self, entry: Entry) -> None:
        self._write(
            "INSERT INTO entries (shelf, name, entry) VALUES (?, ?, ?) "
            "ON CONFLICT (shelf, name) DO UPDATE SET entry = excluded.entry",
            (entry.shelf, entry.name, msgspec.json.encode(entry)),
        )

    def delete(self, shelf: str, name: str) -> None:
        self._write("DELETE FROM entries WHERE shelf = ? AND name = ?", (shelf, name))

    def used(self, shelf: str, name: str, when: float, tokens: int, seconds: float) -> None:
        self._write(
            "UPDATE entries SET hits = hits + 1, last_used = ?, tokens_saved = tokens_saved + ?, "
            "seconds_saved = seconds_saved + ? WHERE shelf = ? AND name = ?",
            (when, tokens, seconds, shelf, name),
        )

    def touch(self, shelf: str, name: str, when: float) -> None:
        """Notes a use that is no hit."""
        self._write("UPDATE entries SET last_used = ? WHERE shelf = ? AND name = ?", (when, shelf, name))

    def ends(self, entry: Entry) -> float | None:
        """When it ends, in seconds since 1970; None: never. Of an automatic one time counts from its last
        use."""
        if entry.expires is None or entry.origin != "automatic":
            return entry.expires
        last = self.usage(entry.shelf, entry.name).last_used or 0.0
        return entry.expires + max(last - entry.updated, 0.0)

    def is_over(self, entry: Entry, now: float) -> bool:
        return (ends := self.ends(entry)) is not None and ends <= now

    def usage(self, shelf: str, name: str) -> Usage:
        row = self._row(
            "SELECT hits, last_used, tokens_saved, seconds_saved FROM entries WHERE shelf = ? AND name = ?",
            (shelf, name),
        )
        return Usage(*row) if row else Usage()

    def weights_hash(self, path: str, identity: Identity) -> str | None:
        values = (path, json.dumps(identity))
        row = self._row("SELECT sha256 FROM weights WHERE path = ? AND identity = ?", values)
        return str(row[0]) if row else None

    def put_weights_hash(self, path: str, identity: Identity, sha256: str) -> None:
        self._write("INSERT OR REPLACE INTO weights VALUES (?, ?, ?)", (path, json.dumps(identity), sha256))
