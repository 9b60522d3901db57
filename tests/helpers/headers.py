"""Cache files whose headers say something else, with the right hash of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from headstart.caches.cache_file.header import NO_HASH, hashed
from servers import Json

Change = Callable[[Json], object]


def with_header(whole: bytes, text: bytes) -> bytes:
    """The file with this header, in which its own hash is still to be put in."""
    length = int.from_bytes(whole[:8], "little")
    text = hashed(text)
    return len(text).to_bytes(8, "little") + text + whole[8 + length :]


def header_of(whole: bytes) -> Json:
    header: Json = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    return header


def changed(whole: bytes, change: Change) -> bytes:
    """The file with a changed header."""
    header = header_of(whole)
    change(header)
    if isinstance(header.get("__metadata__"), dict) and "blake3" in header["__metadata__"]:
        header["__metadata__"]["blake3"] = NO_HASH
    return with_header(whole, json.dumps(header).encode())


def with_entry(whole: bytes, **fields: Any) -> bytes:
    """The file with other fields of its entry."""

    def change(header: Json) -> None:
        entry = json.loads(header["__metadata__"]["entry"]) | fields
        header["__metadata__"]["entry"] = json.dumps(entry)

    return changed(whole, change)
