"""The file of one block of the state store, named `<address>.block`. It is written once and never changed.

    header      as in `block_header.py`
    data        the values of the tokens
    checkpoint  what belongs to the last token alone; may be empty

There are no gaps, so each byte is covered by a hash. Whoever can write in the directory can also compute
hashes: they find damage, and nothing that is read is used before its type and range are checked.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from blake3 import blake3

from headstart.engine.states.block_header import (
    MAX_HEADER,
    BlockHeader,
    DamagedBlock,
    Hashes,
    address_of,
    decoded,
    encoded,
    problem_of,
)
from headstart.engine.states.huge_pages import new_memory
from headstart.regular_files import NotAFile, check_written, open_file, shown

__all__ = ["BlockFile", "BlockHeader", "DamagedBlock", "address_of"]

SUFFIX = ".block"
# A file that is still being written; left over if the process was killed.
UNFINISHED = ".unfinished"
# A directory has the blocks of one root, and its name is the beginning of it.
ROOT_DIGITS = 16
# Linux writes at most 2 GiB at once, macOS refuses more.
WRITE_BYTES = 1 << 30
# Smaller memory isn't worth a mapping of its own.
MAPPED_BYTES = 64 << 10


@dataclass(frozen=True)
class BlockFile:
    """A file whose header was checked. `size`: of the file. `identity`: device and inode. `offset`: the place
    of the data. `hashes`: of data and checkpoint. `used`: the last use, by the file's time."""

    header: BlockHeader
    path: Path
    size: int
    identity: tuple[int, int]
    offset: int
    hashes: Hashes
    used: float


def write(directory: Path, header: BlockHeader, data: memoryview, checkpoint: memoryview) -> BlockFile:
    """Writes the block's file into the directory of its root. It is whole or absent even if the process is
    killed meanwhile. It isn't synced: a power failure can damage it, which reading finds out. Raises OSError,
    leaving nothing behind."""
    data, checkpoint = data.cast("B"), checkpoint.cast("B")
    hashes = blake3(data).digest(), blake3(checkpoint).digest()
    beginning = encoded(header, hashes)
    assert (header.data_bytes, header.checkpoint_bytes) == (len(data), len(checkpoint))
    assert not problem_of(header), problem_of(header)
    assert directory.name == header.root[:ROOT_DIGITS], "not the directory of this root"
    path = directory / f"{header.address}{SUFFIX}"
    unfinished = directory / f"{header.address}.{secrets.token_hex(4)}{UNFINISHED}"
    try:
        stat = _write_new(unfinished, (memoryview(beginning), data, checkpoint))
        unfinished.rename(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise
    return _file_of(header, path, stat, len(beginning), hashes)


def _write_new(path: Path, parts: Sequence[memoryview]) -> os.stat_result:
    """Also raises an OSError that only closing the file reports."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for part in parts:
            for begin in range(0, len(part), WRITE_BYTES):
                _write_all(handle, part[begin : begin + WRITE_BYTES])
        stat = os.fstat(handle)
    finally:
        os.close(handle)
    return stat


def _write_all(handle: int, rest: memoryview) -> None:
    while rest:
        rest = rest[os.write(handle, rest) :]


def read_header(path: Path) -> BlockFile:
    """Reads and checks everything but data and checkpoint. Raises DamagedBlock, or OSError if the file can't
    be opened or read."""
    try:
        return _read_header(path)
    except DamagedBlock as error:
        raise DamagedBlock(f"{shown(path)}: {error}") from error


def _read_header(path: Path) -> BlockFile:
    with _opened(path) as file:
        stat = os.fstat(file.fileno())
        content = os.pread(file.fileno(), MAX_HEADER, 0)
    header, hashes, offset = decoded(content)
    if path.name != f"{header.address}{SUFFIX}":
        raise DamagedBlock("it is named after another block")
    if path.parent.name != header.root[:ROOT_DIGITS]:
        raise DamagedBlock("it belongs to another root")
    if stat.st_size != offset + header.data_bytes + header.checkpoint_bytes:
        raise DamagedBlock("it has another length than its header says")
    return _file_of(header, path, stat, offset, hashes)


def _file_of(header: BlockHeader, path: Path, stat: os.stat_result, offset: int, hashes: Hashes) -> BlockFile:
    identity = stat.st_dev, stat.st_ino
    return BlockFile(header, path, stat.st_size, identity, offset, hashes, stat.st_mtime)


def read(block: BlockFile) -> tuple[memoryview, memoryview]:
    """Reads data and checkpoint into new memory and checks their hashes. Other threads run meanwhile. Raises
    DamagedBlock, or OSError if the file can't be opened or read, or memory is short."""
    try:
        data, checkpoint = _read(block)
        if (_hash_of(data), _hash_of(checkpoint)) != block.hashes:
            raise DamagedBlock("wrong hash of its data")
    except DamagedBlock as error:
        raise DamagedBlock(f"{shown(block.path)}: {error}") from error
    return data, checkpoint


def _read(block: BlockFile) -> tuple[memoryview, memoryview]:
    header = block.header
    with _opened(block.path) as file:
        stat = os.fstat(file.fileno())
        if (stat.st_dev, stat.st_ino, stat.st_size) != (*block.identity, block.size):
            raise DamagedBlock("it was replaced")
        data, checkpoint = _memory(header.data_bytes), _memory(header.checkpoint_bytes)
        _fill(file, block.offset, data)
        _fill(file, block.offset + len(data), checkpoint)
    return data, checkpoint


def _opened(path: Path) -> BufferedReader:
    """Raises DamagedBlock if the path leads to no regular file, or to a large one that is mostly holes; or
    OSError."""
    try:
        file = open_file(path)
    except NotAFile as error:
        raise DamagedBlock(error.strerror) from error
    try:
        check_written(file)
    except OSError as error:
        file.close()
        raise DamagedBlock(error.strerror) from error
    return file


def _memory(size: int) -> memoryview:
    """New memory. Raises OSError if there is too little."""
    return memoryview(bytearray(size) if size < MAPPED_BYTES else new_memory(size))


def _fill(file: BufferedReader, at: int, memory: memoryview) -> None:
    while memory:
        n = os.preadv(file.fileno(), [memory], at)
        if n == 0:
            raise DamagedBlock("it is too short")
        memory, at = memory[n:], at + n


def _hash_of(memory: memoryview) -> bytes:
    return blake3(memory, max_threads=blake3.AUTO).digest()


def touch(block: BlockFile) -> None:
    """Notes a use of the block as the file's time, if possible."""
    now = time.time()
    with suppress(OSError):
        os.utime(block.path, (now, now), follow_symlinks=False)


def remove(block: BlockFile) -> None:
    """Raises OSError, but not if the file isn't there."""
    block.path.unlink(missing_ok=True)
