"""The cache file: safetensors, so that standard tools can open it.

    8 bytes    length of the header, little-endian
    header     JSON: for each form the tensors `<form>.tokens` (I32) and `<form>.state` (U8), and as
               `__metadata__`: format, entry (JSON), `blake3 <tensor>` of each, and `blake3` of the header
    tensors    in the header's order, without gaps

Of a form whose state lies in a file of its own (`beside.py`) there is no tensor `<form>.state`; its size is
in the metadata as `bytes <form>.state`, its hash as that of others is.

Format 1. The hash of the header is taken over its bytes, with zeros in the place of the hash itself.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any, BinaryIO

import msgspec
from blake3 import blake3

from headstart.caches.beside import CACHE_SUFFIX, state_path
from headstart.caches.beside import hashed as hashed_file
from headstart.caches.entry import Entry, Form, Identity, StoredForm

FORMAT = "headstart/1"
LENGTH = Struct("<Q")
MAX_HEADER = 64 << 20
NO_HASH = "0" * 64
BESIDE = "bytes "


class Corrupt(Exception):
    """The file is not what was written."""


@dataclass(frozen=True)
class Part:
    """One form that is stored already: its token ids, and where its state is: `size` bytes at `offset` of a
    file."""

    tokens: list[int]
    path: Path
    offset: int
    size: int


def identity_of(stat: os.stat_result) -> Identity:
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def header_text(entry: Entry, tensors: Mapping[str, Any], hashes: Mapping[str, str]) -> bytes:
    """The header as JSON, its own hash still to be put in by `hashed`."""
    described = msgspec.structs.replace(entry, forms={}, identity=(0, 0, 0, 0))
    content = msgspec.json.encode(described).decode()
    metadata = {"format": FORMAT, "blake3": NO_HASH, "entry": content, **hashes}
    return json.dumps({"__metadata__": metadata, **tensors}).encode()


def hashed(text: bytes) -> bytes:
    """The header with its own hash in the place that `header_text` left for it."""
    return text.replace(NO_HASH.encode(), blake3(text).hexdigest().encode(), 1)


def read(path: Path, *, whole: bool = True) -> Entry:
    """Reads and checks the header. Not `whole`: also of a file that ends before its states do, whose prompt
    is there all the same. Raises Corrupt, or OSError when the file can't be opened."""
    with opened(path) as file:
        header, start = read_header(file)
        stat = os.fstat(file.fileno())
    try:
        entry = msgspec.json.decode(header["__metadata__"]["entry"], type=Entry)
        forms = _forms(header, start)
        tensors = (tensor for name, tensor in header.items() if name != "__metadata__")
        end = start + max([0, *(tensor["data_offsets"][1] for tensor in tensors)])
    except (KeyError, ValueError, TypeError, msgspec.MsgspecError) as error:
        raise Corrupt(f"{path}: {error}") from error
    if whole and end != stat.st_size:
        raise Corrupt(f"{path}: {stat.st_size} bytes instead of {end}")
    return msgspec.structs.replace(entry, forms=forms, identity=identity_of(stat))


def salvaged(path: Path) -> Entry | None:
    """What a file that lost its end says of itself."""
    try:
        entry = read(path, whole=False)
    except (Corrupt, OSError):
        return None
    return entry if (entry.shelf, entry.name + CACHE_SUFFIX) == (path.parent.name, path.name) else None


def verify(path: Path, identity: Identity, *, from_disk: bool = False) -> dict[Form, list[int]]:
    """Checks every hash of the file, which must still be the one with this identity; returns the token ids of
    each form. `from_disk`: what the disk has is checked, as far as the system can be made to read it again,
    not what is in memory. Raises Corrupt, or OSError when the file can't be opened."""
    with opened(path) as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        header, start = read_header(file)
        if identity_of(os.fstat(file.fileno())) != identity:
            raise Corrupt(f"{path}: changed while it was being read")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping, memoryview(mapping) as view:
            tokens: dict[Form, list[int]] = {}
            tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
            if (end := start + max([0, *(t["data_offsets"][1] for t in tensors.values())])) != len(view):
                raise Corrupt(f"{path}: {len(view)} bytes instead of {end}")
            for name, tensor in tensors.items():
                begin, end = tensor["data_offsets"]
                with view[start + begin : start + end] as data:
                    if hash_of(data) != header["__metadata__"][f"blake3 {name}"]:
                        raise Corrupt(f"{path}: wrong hash of {name}")
                    form, _, kind = name.partition(".")
                    if kind == "tokens":
                        tokens[form] = data.cast("i").tolist()  # type: ignore[index]
    for name, size in sizes_beside(header).items():
        state = state_path(path, name)
        if hashed_file(state, from_disk=from_disk) != (size, header["__metadata__"][f"blake3 {name}.state"]):
            raise Corrupt(f"{state}: not the state that belongs to {path.name}")
    return tokens


def sizes_beside(header: Mapping[str, Any]) -> dict[Form, int]:
    """Of the states in files of their own."""
    found: dict[Form, int] = {}
    for name, value in header["__metadata__"].items():
        if name.startswith(BESIDE):
            found[name.removeprefix(BESIDE).partition(".")[0]] = int(value)
    return found


def opened(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")


def read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header, whose hash is right, and where it ends. Raises Corrupt or OSError."""
    start = file.read(LENGTH.size)
    length = LENGTH.unpack(start)[0] if len(start) == LENGTH.size else 0
    if not 0 < length <= MAX_HEADER:
        raise Corrupt(f"{file.name}: no header")
    try:
        text = file.read(length)
        header = json.loads(text)
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise Corrupt(f"{file.name}: format {metadata['format']!r} instead of {FORMAT!r}")
        unhashed = text.replace(metadata["blake3"].encode(), NO_HASH.encode(), 1)
        if metadata["blake3"] != blake3(unhashed).hexdigest():
            raise Corrupt(f"{file.name}: wrong hash of the header")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"{file.name}: unreadable header") from error
    return header, LENGTH.size + length


def _forms(header: Mapping[str, Any], start: int) -> dict[Form, StoredForm]:
    forms: dict[Form, StoredForm] = {}
    beside = sizes_beside(header)
    for name, tensor in header.items():
        form, _, kind = name.partition(".")
        if kind == "tokens" and form in beside:
            forms[form] = StoredForm(tensor["shape"][0], 0, beside[form], beside=True)
        elif kind == "tokens":
            state = header[f"{form}.state"]["data_offsets"]
            forms[form] = StoredForm(  # type: ignore[index]
                n_tokens=tensor["shape"][0],
                state_offset=start + state[0],
                state_bytes=state[1] - state[0],
            )
    return forms


def hash_of(data: memoryview) -> str:
    return blake3(data, max_threads=blake3.AUTO).hexdigest()


@contextmanager
def mapped(part: Part) -> Iterator[memoryview]:
    with (
        opened(part.path) as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping,
        memoryview(mapping) as view,
        view[part.offset : part.offset + part.size] as state,
    ):
        yield state
