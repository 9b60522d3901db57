"""`headstart cache export` and `import`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from headstart.cli.cache import chosen_model, out, size_of, verb_of
from headstart.cli.client import Client, RequestFailed, cache_path

SUFFIX = ".headstart"
READ_BYTES = 1 << 20


def export_file(client: Client, name: str, model: str | None, path: Path | None) -> None:
    """Writes the cache's file, whole or not at all, readable by its owner only. Raises RequestFailed."""
    pieces = client.download(cache_path(chosen_model(client, model), name) + "/file")
    # Nothing is written, under whatever name, before the server has found the cache.
    first = next(pieces, b"")
    target = path or Path(name + SUFFIX)
    try:
        size = _write(target, first, pieces)
    except OSError as error:
        raise RequestFailed(f"Can't write {target}: {error.strerror}") from error
    out.print(f"Exported cache {name!r} to {target}: {size / 1e6:.2f} MB")


def _write(target: Path, first: bytes, pieces: Iterator[bytes]) -> int:
    handle, scratch = tempfile.mkstemp(prefix=".headstart-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as output:
            output.write(first)
            for piece in pieces:
                output.write(piece)
            size = output.tell()
        Path(scratch).replace(target)
    except BaseException:
        with suppress(FileNotFoundError):
            Path(scratch).unlink()
        raise
    return size


def import_file(client: Client, path: Path, name: str | None, model: str | None, *, rebuild: bool) -> None:
    """Raises RequestFailed."""
    name = path.name.removesuffix(SUFFIX) if name is None else name
    place = cache_path(chosen_model(client, model), name) + "/file"
    try:
        with path.open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            made = client.upload(place + "?rebuild=true" * rebuild, _pieces(source, size), size)
    except OSError as error:
        raise RequestFailed(f"Can't read {path}: {error.strerror}") from error
    out.print(f"{verb_of(made)} cache {made['cache_name']!r} of {made['model']}: {size_of(made)}")


def _pieces(source: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0:
        piece = source.read(min(size, READ_BYTES))
        if not piece:
            raise RequestFailed(f"{source.name} became shorter while it was read.")
        size -= len(piece)
        yield piece
