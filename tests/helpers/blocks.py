"""Blocks of the state store, made without a model."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from headstart.engine.states import block_file
from headstart.engine.states.block_directory import directory_of
from headstart.engine.states.block_file import BlockFile, BlockHeader, address_of
from headstart.engine.states.block_header import MAGIC

ROOT = "5a" * 32


def directory(model_dir: Path, root: str = ROOT) -> Path:
    made = directory_of(model_dir, root)
    made.mkdir(parents=True, exist_ok=True)
    return made


def header(
    tokens: Sequence[int],
    parent: BlockHeader | None = None,
    *,
    root: str = ROOT,
    owner: str = "",
    cuts: tuple[int, ...] | None = (),
    run: str = "",
    sizes: tuple[int, int] = (1000, 0),
) -> BlockHeader:
    above, start = (parent.address, parent.end) if parent else ("", 0)
    address = address_of(above, root, owner, start, tokens, cuts, run)
    return BlockHeader(address, above, root, start, owner, cuts, run, array("i", tokens), *sizes, 1.5)


def content(header: BlockHeader) -> tuple[memoryview, memoryview]:
    """Data and checkpoint, which follow from the address."""
    data = blake3(header.address.encode()).digest(length=header.data_bytes)
    checkpoint = blake3(header.address.encode()[::-1]).digest(length=header.checkpoint_bytes)
    return memoryview(data), memoryview(checkpoint)


def write(place: Path, header: BlockHeader, used: float | None = None) -> BlockFile:
    written = block_file.write(place, header, *content(header))
    if used is not None:
        os.utime(written.path, (used, used))
    return written


def write_chain(
    place: Path,
    tokens: Sequence[int],
    parent: BlockHeader | None = None,
    *,
    size: int = 4,
    root: str = ROOT,
    owner: str = "",
    used: float | None = None,
) -> list[BlockHeader]:
    """Blocks of `size` tokens, the last of the rest."""
    chain = []
    for begin in range(0, len(tokens), size):
        parent = header(tokens[begin : begin + size], parent, root=root, owner=owner)
        write(place, parent, used)
        chain.append(parent)
    return chain


def forged(fields: dict[str, Any], tokens: bytes) -> bytes:
    """A header with these fields, whatever they are, and the right hash."""
    encoded = msgspec.msgpack.encode(fields)
    rest = len(encoded).to_bytes(4, "little") + encoded + tokens
    return MAGIC + blake3(rest).digest() + rest
