"""A cache's file that came from somewhere else: nothing about it is taken for granted."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from headstart.caches.cache_file import format
from headstart.caches.cache_file.entry_checks import RECORD, check_terms
from headstart.caches.cache_file.format import Corrupt
from headstart.caches.entry import Entry


def inspect(path: Path) -> Entry:
    """What the file holds, once every hash and every field in it was found to be right; of a response without
    the response itself, whose place isn't here. Raises Corrupt, or OSError when it can't be read.

    The hashes show damage, not where a file comes from: whoever makes one up can make them fit."""
    entry = format.read(path)
    if entry.beside:
        raise Corrupt("its states are in other files, as those of the NPU's runtime are")
    if entry.origin == "response":
        metadata = {key: value for key, value in entry.terms.metadata.items() if key != RECORD}
        entry = replace(entry, terms=replace(entry.terms, metadata=metadata))
    try:
        check_terms(entry.terms)
    except ValueError as error:
        raise Corrupt(str(error)) from error
    format.verify(path, entry.identity)
    return entry
