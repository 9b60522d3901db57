"""The cache file: safetensors, so that standard tools can open it.

    8 bytes    length of the header, little-endian
    header     JSON: for each form the tensors `<form>.tokens` (I32) and `<form>.state` (U8), and as
               `__metadata__`: format, entry (JSON), `blake3 <tensor>` of each, and `blake3` of the header
    tensors    in the header's order, without gaps

A form whose state is in a sidecar file (`sidecar.py`) has no tensor `<form>.state`; the size is in the
metadata as `bytes <form>.state`, the hash as for other tensors.

This is format 1 (`header.py`). The hash of the header covers its bytes, with zeros in place of the hash.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import msgspec
from blake3 import blake3

from headstart.caches.cache_file.header import LENGTH, MAX_HEADER, Corrupt, hashed, header_text, read_header
from headstart.caches.cache_file.sidecar import CACHE_SUFFIX, state_path
from headstart.caches.cache_file.sidecar import hashed as hashed_file
from headstart.caches.entry import Entry, Form, Identity
from headstart.regular_files import NotAFile, check_written, open_file, shown

__all__ = ["LENGTH", "MAX_HEADER", "Corrupt", "hashed", "header_text", "open_file", "read_header"]


@dataclass(frozen=True)
class StatePart:
    """A stored form: its token ids, and its state as `size` bytes at `offset` of a file."""

    tokens: list[int]
    path: Path
    offset: int
    size: int


def identity_of(stat: os.stat_result) -> Identity:
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def read(path: Path, *, whole: bool = True) -> Entry:
    """Reads and checks the header and the entry in it. Not `whole`: also accepts a file that is truncated
    within its states, since its content is intact. Raises Corrupt, or OSError if the file can't be opened."""
    with _opened(path) as file:
        header = read_header(file)
        stat = os.fstat(file.fileno())
    try:
        entry = header.entry
    except Corrupt as error:
        raise Corrupt(f"{shown(path)}: {error}") from error
    if whole and header.end != stat.st_size:
        raise Corrupt(f"{shown(path)}: {stat.st_size} bytes instead of {header.end}")
    return msgspec.structs.replace(entry, identity=identity_of(stat))


def salvaged(path: Path) -> Entry | None:
    """The entry of a truncated file; None if its header can't be read."""
    try:
        entry = read(path, whole=False)
    except (Corrupt, OSError):
        return None
    return entry if (entry.namespace, entry.name + CACHE_SUFFIX) == (path.parent.name, path.name) else None


def verify(path: Path, identity: Identity, *, from_disk: bool = False) -> dict[Form, list[int]]:
    """Checks every hash of the file, which must still have this identity; returns the token ids of each form.
    `from_disk`: reads from the disk and not from the page cache, as far as the system allows. Raises Corrupt,
    or OSError if the file can't be opened."""
    with _opened(path) as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        header = read_header(file)
        stat = os.fstat(file.fileno())
        if identity_of(stat) != identity:
            raise Corrupt(f"{path}: changed while it was being read")
        if header.end != stat.st_size:
            raise Corrupt(f"{path}: {stat.st_size} bytes instead of {header.end}")
        check_written(file)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping, memoryview(mapping) as view:
            tokens: dict[Form, list[int]] = {}
            for name, tensor in header.tensors.items():
                begin, end = (header.start + offset for offset in tensor.data_offsets)
                with view[begin:end] as data:
                    if hash_of(data) != header.hash_of(name):
                        raise Corrupt(f"{path}: wrong hash of {name}")
                    form, _, kind = name.partition(".")
                    if kind == "tokens":
                        tokens[form] = data.cast("i").tolist()  # type: ignore[index]
    for form, size in header.sidecar_sizes.items():
        state = state_path(path, form)
        expected = size, header.hash_of(f"{form}.state")
        # A file of another size, which may be huge, need not be read.
        if os.lstat(state).st_size != size or hashed_file(state, from_disk=from_disk) != expected:
            raise Corrupt(f"{state}: not the state that belongs to {path.name}")
    return tokens


def read_tokens(path: Path) -> dict[Form, list[int]]:
    """The token ids of each form, whose hashes are checked; states aren't read. Raises Corrupt, or OSError if
    the file can't be opened."""
    with _opened(path) as file:
        header = read_header(file)
        tokens: dict[Form, list[int]] = {}
        for form in header.forms:
            begin, end = header.tensors[f"{form}.tokens"].data_offsets
            data = memoryview(os.pread(file.fileno(), end - begin, header.start + begin))
            if hash_of(data) != header.hash_of(f"{form}.tokens"):
                raise Corrupt(f"{path}: wrong hash of {form}.tokens")
            tokens[form] = data.cast("i").tolist()
    return tokens


def _opened(path: Path) -> BufferedReader:
    """Raises Corrupt if the path is no regular file, or OSError."""
    try:
        return open_file(path)
    except NotAFile as error:
        raise Corrupt(f"{shown(path)}: {error.strerror}") from error


def hash_of(data: memoryview) -> str:
    return blake3(data, max_threads=blake3.AUTO).hexdigest()


@contextmanager
def mapped(part: StatePart) -> Iterator[memoryview]:
    with (
        open_file(part.path) as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping,
        memoryview(mapping) as view,
        view[part.offset : part.offset + part.size] as state,
    ):
        yield state
