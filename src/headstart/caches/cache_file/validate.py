"""Validation of a cache file from elsewhere; nothing in it is trusted."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from headstart.caches.cache_file import format
from headstart.caches.cache_file.entry_checks import RECORD, check_retention
from headstart.caches.cache_file.format import Corrupt
from headstart.caches.entry import Entry


def read_intact(path: Path) -> Entry:
    """The entry of the file, after every hash and every field was checked. The entry of a response comes
    without the response itself, which is of no use here. Raises Corrupt, or OSError if the file can't be
    read.

    The hashes reveal damage but don't prove the origin of a file: a forger can compute them too."""
    entry = format.read(path)
    if entry.sidecar_forms:
        raise Corrupt("its states are in other files, as those of the NPU's runtime are")
    if entry.origin == "response":
        metadata = {key: value for key, value in entry.retention.metadata.items() if key != RECORD}
        entry = replace(entry, retention=replace(entry.retention, metadata=metadata))
    try:
        check_retention(entry.retention)
    except ValueError as error:
        raise Corrupt(str(error)) from error
    format.verify(path, entry.identity)
    return entry
