"""A cache's file that came from somewhere else: nothing about it is taken for granted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headstart.caches import file
from headstart.caches.entry import FORMS, Entry
from headstart.caches.file import Corrupt


def inspect(path: Path) -> Entry:
    """What the file holds, once every hash and every number in it was found to be right. Raises Corrupt, or
    OSError when it can't be read.

    The hashes show damage, not where a file comes from: whoever makes one up can make them fit."""
    try:
        with file.opened(path) as opened:
            header, _ = file.read_header(opened)
        if file.sizes_beside(header):
            raise Corrupt("its states are in other files, as those of the NPU's runtime are")
        _check_tensors({name: tensor for name, tensor in header.items() if name != "__metadata__"})
        entry = file.read(path)
        file.verify(path, entry.identity)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise Corrupt(f"unreadable header: {error}") from error
    if not entry.content.opening:
        raise Corrupt("it has no text")
    if entry.terms.ttl_seconds is not None and not 0 < entry.terms.ttl_seconds < float("inf"):
        raise Corrupt("its time is none")
    return entry


def _check_tensors(tensors: dict[str, Any]) -> None:
    """They are what a cache has, of the right type and size, one after the other without gaps."""
    forms = {name.partition(".")[0] for name in tensors}
    if not forms <= set(FORMS) or tensors.keys() != {f"{f}.{kind}" for f in forms for kind in KINDS}:
        raise Corrupt("other tensors than a cache has")
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, width = KINDS[name.partition(".")[2]]
        begin, after = tensor["data_offsets"]
        (n,) = tensor["shape"]
        if not all(type(number) is int for number in (n, begin, after)):
            raise Corrupt(f"{name}: not a number")
        if tensor["dtype"] != dtype or n <= 0 or begin != end or after != begin + width * n:
            raise Corrupt(f"{name}: not where or what it should be")
        end = after


KINDS = {"tokens": ("I32", 4), "state": ("U8", 1)}
