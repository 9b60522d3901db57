"""Small records in an SQLite database, each with its own hash.

Nothing in the file is trusted. A record counts only if its hash is right; tables are used only if they are
declared as here; a damaged database is replaced by a new one. A file that isn't regular, or another program's
database, is left alone.

Deleted data is overwritten, in the database and in its log.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from blake3 import blake3

from headstart.caches.entry import Entry
from headstart.caches.index import old_index

log = logging.getLogger(__name__)

SCHEMA = "CREATE TABLE records (kind TEXT, key TEXT, value BLOB, blake3 BLOB, PRIMARY KEY (kind, key))"
DECLARED = {("table", "records"): SCHEMA, ("index", "sqlite_autoindex_records_1"): None}
# Identifies a database as an index, whatever happened to its tables.
APPLICATION = int.from_bytes(b"Head", "big")
# Marks a database in which no rows deleted by earlier releases are left; those overwrote nothing.
WIPED = 2
MAKE = f"{SCHEMA}; PRAGMA application_id = {APPLICATION}; "
# How long the index's own thread, and a start, wait for another process's lock.
LOCK_SECONDS = 0.2
SIDES = ("", "-wal", "-shm", "-journal")
# SQLite's codes for a file that isn't a database or lacks the right tables. All other errors, such as locks
# and full disks, may be temporary. Extended codes have one of these in their lowest byte.
DAMAGE = {
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_TOOBIG,
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_MISMATCH,
}

# Kind and key.
RecordKey = tuple[str, str]
# The declarations in a database, by type and name.
Declared = dict[tuple[str, str], str | None]


def is_damage(error: Exception) -> bool:
    """Whether the error means a damaged database, not one that is unavailable at the moment."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    return isinstance(error, sqlite3.DatabaseError) and code & 0xFF in DAMAGE


class Records:
    """Used by one thread at a time. Methods raise sqlite3.Error or OSError, with nothing changed.
    `must_wipe`: deleted rows are still in the log; the next write, even of nothing, wipes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database: sqlite3.Connection | None = None
        self.must_wipe = False

    @property
    def is_open(self) -> bool:
        return self._database is not None

    def open(self, *, migrate: bool = True) -> list[Entry]:
        """Opens the database; creates one if there is none or it is damaged. With `migrate`, converts one of
        an earlier release and returns the entries in it."""
        try:
            return self._open(migrate)
        except sqlite3.DatabaseError as error:
            self.close()
            if not is_damage(error):
                raise
            log.warning("the index %s can't be read (%s): creating a new one", self.path, error)
            for side in SIDES:
                Path(f"{self.path}{side}").unlink(missing_ok=True)
        except OSError:
            self.close()
            raise
        return self._open(migrate)

    def _open(self, migrate: bool) -> list[Entry]:
        _check_files(self.path)
        database = self._database = sqlite3.connect(
            self.path, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False
        )
        # Text that is not UTF-8 matches no hash, and must not prevent reading other rows.
        database.text_factory = lambda text: text.decode(errors="replace")
        declared = _declared(database)
        old = old_index.read(database) if old_index.is_one(declared) else None
        if old and not migrate:
            raise FileExistsError(errno.EEXIST, "the next start brings it up to date", str(self.path))
        if declared and not old:
            _check_ours(database, declared, self.path)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("PRAGMA secure_delete = ON")
        if not declared:
            database.executescript(f"BEGIN IMMEDIATE; {MAKE} PRAGMA user_version = {WIPED}; COMMIT;")
        elif old:
            database.executescript(f"BEGIN IMMEDIATE; {old_index.DROP} {MAKE}")
            self._finish(old.records)
        if (found := database.execute("PRAGMA integrity_check").fetchone()) != ("ok",):
            raise sqlite3.DatabaseError(*found)
        self._wipe_once(database)
        return old.entries if old else []

    def _wipe_once(self, database: sqlite3.Connection) -> None:
        if database.execute("PRAGMA user_version").fetchone() == (WIPED,):
            return
        try:
            database.execute("VACUUM")
            database.execute(f"PRAGMA user_version = {WIPED}")
            self.must_wipe = True
            self._wipe()
        except sqlite3.OperationalError as error:
            log.warning("deleted texts are still in %s until the next start (%s)", self.path, error)

    def close(self) -> None:
        if self._database:
            self._database.close()
            self._database = None

    def all(self) -> Iterator[tuple[str, str, bytes]]:
        """Kind, key and value of each record; those with a wrong hash are deleted."""
        assert self._database
        wrong = []
        for row, *record, seal in self._database.execute(
            "SELECT rowid, kind, key, value, blake3 FROM records"
        ):
            match record:
                case [str(kind), str(key), bytes(value)] if seal == _seal(kind, key, value):
                    yield kind, key, value
                case _:
                    wrong.append((row,))
        if wrong:
            log.warning("the index %s: %d damaged records are ignored", self.path, len(wrong))
            self._database.executemany("DELETE FROM records WHERE rowid = ?", wrong)
            self.must_wipe = True

    def write(self, changes: Mapping[RecordKey, bytes | None]) -> None:
        """Stores each value; None deletes the record. The changes are atomic."""
        assert self._database
        self._database.execute("BEGIN IMMEDIATE")
        self._finish(changes)
        self._wipe()

    def _finish(self, changes: Mapping[RecordKey, bytes | None]) -> None:
        """Applies these changes and commits the open transaction."""
        assert self._database
        deleted = [key for key, value in changes.items() if value is None]
        put = [(*key, value, _seal(*key, value)) for key, value in changes.items() if value is not None]
        try:
            self._database.executemany("DELETE FROM records WHERE kind = ? AND key = ?", deleted)
            self._database.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", put)
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise
        self.must_wipe |= bool(deleted)

    def _wipe(self) -> None:
        """Empties the log, which still contains deleted rows. If another process is reading it, the next
        write empties it."""
        assert self._database
        if self.must_wipe:
            busy, _, _ = self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self.must_wipe = bool(busy)


def _seal(kind: str, key: str, value: bytes) -> bytes:
    return blake3(b"\0".join([kind.encode(errors="replace"), key.encode(errors="replace"), value])).digest()


def _check_files(path: Path) -> None:
    """Creates an empty file if there is none. Raises OSError unless all of SQLite's files are regular: it
    would wait for a pipe, and follow a link."""
    for side in SIDES:
        try:
            mode = Path(f"{path}{side}").lstat().st_mode
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a regular file", f"{path}{side}")
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600))


def _declared(database: sqlite3.Connection) -> Declared:
    """The database's declarations, by type and name. Check them before any other use: SQLite runs whatever a
    view, a trigger or an index says."""
    rows = database.execute("SELECT type, name, sql FROM sqlite_master")
    return {(str(kind), str(name)): sql for kind, name, sql in rows}


def _check_ours(database: sqlite3.Connection, declared: Declared, path: Path) -> None:
    """Raises DatabaseError for an index whose tables differ from those created here, OSError for another
    program's database."""
    if declared == DECLARED:
        return
    made = database.execute("PRAGMA application_id").fetchone() == (APPLICATION,)
    if made or {name for kind, name in declared if kind == "table"} <= {"records", *old_index.TABLES}:
        raise sqlite3.DatabaseError("its tables are not as they were made")
    raise FileExistsError(errno.EEXIST, "it is a database of something else", str(path))
