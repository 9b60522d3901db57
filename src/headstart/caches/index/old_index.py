"""The index format of earlier releases: rows without hashes, with a copy of each cache's entry.

Usage figures are taken over if they are plausible. An entry is used only for a cache whose file can't be
read, since nothing proves that the entry is unchanged. Hashes of weights are computed again.
"""

from __future__ import annotations

import logging
import re
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from headstart.caches.cache_file.entry_checks import entry_of
from headstart.caches.entry import Entry
from headstart.caches.index.usage import CacheUsage, usage_key

log = logging.getLogger(__name__)

TABLES = ("caches", "entries", "weights")
DROP = "".join(f"DROP TABLE IF EXISTS {table}; " for table in TABLES)
# All words in their declarations: a table that declares more may run anything when it is read.
WORDS = {
    *("CREATE", "TABLE", "TEXT", "BLOB", "INTEGER", "REAL", "NOT", "NULL", "DEFAULT", "0", "PRIMARY", "KEY"),
    *("caches", "entries", "weights", "shelf", "model", "name", "entry", "path", "identity", "sha256"),
    *("hits", "last_used", "tokens_saved", "seconds_saved"),
}
FIGURES = ("hits", "last_used", "tokens_saved", "seconds_saved")


@dataclass(frozen=True)
class Old:
    """`records` in the format of this release."""

    records: dict[tuple[str, str], bytes] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)


def is_one(declared: Mapping[tuple[str, str], str | None]) -> bool:
    """Whether a database with these declarations, by type and name, is exactly an index of earlier
    releases."""
    tables = {name for kind, name in declared if kind == "table"}
    plain = all(
        set(re.findall(r"\w+", sql)) <= WORDS if sql else kind == "index"
        for (kind, _), sql in declared.items()
    )
    return plain and "entries" in tables and tables <= set(TABLES)


def read(database: sqlite3.Connection) -> Old:
    """Reads the database; ignores invalid rows. Raises DatabaseError if it is damaged."""
    if (found := database.execute("PRAGMA integrity_check").fetchone()) != ("ok",):
        raise sqlite3.DatabaseError(*found)
    old = Old()
    cursor = database.execute("SELECT * FROM entries")
    columns = [column[0] for column in cursor.description]
    for values in cursor:
        try:
            _take(old, dict(zip(columns, values, strict=True)))
        except (KeyError, TypeError, ValueError, msgspec.MsgspecError) as error:
            log.warning("a row of the index is ignored: %s", error)
    return old


def _take(old: Old, row: Mapping[str, Any]) -> None:
    entry = entry_of(row["entry"])
    if (entry.namespace, entry.name) != (row["shelf"], row["name"]):
        raise ValueError("it is about another cache than it says")
    old.entries.append(entry)
    usage = msgspec.convert({name: row[name] for name in FIGURES if name in row}, CacheUsage)
    old.records[usage_key(entry.key)] = msgspec.json.encode(usage)
