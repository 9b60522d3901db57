"""The directory of one root's blocks, `<root, 16 hex>` in the directory of a model."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from headstart.engine.states import block_file
from headstart.engine.states.block_file import ROOT_DIGITS, SUFFIX, UNFINISHED, BlockFile, DamagedBlock

log = logging.getLogger(__name__)

LOCK = ".lock"
# The process has no room for another open file: that says nothing about the file.
NOT_THE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def directory_of(model_dir: Path, root: str) -> Path:
    """The directory of a root's blocks."""
    return model_dir / root[:ROOT_DIGITS]


class BlockDirectory:
    """The directory of one root's blocks. From `acquire` to `close` it belongs to this process. `damaged`:
    the number of damaged files that scans have found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        self._lock: int | None = None

    def acquire(self) -> bool:
        """Creates the directory if necessary, and takes it; False if a process has it already. Raises
        OSError."""
        assert self._lock is None
        lock = self._opened_lock()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException as error:
            os.close(lock)
            if isinstance(error, BlockingIOError):
                return False
            raise
        self._lock = lock
        return True

    def _opened_lock(self) -> int:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            return os.open(self.path / LOCK, flags, 0o600)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            # The disk is mounted read-only: its blocks can be used, and no process writes.
            return os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Releases the directory, as the death of the process does."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def scan(self) -> list[BlockFile]:
        """The blocks in the directory, parents first. Removes whatever else is named as a block: unfinished
        and damaged files, and blocks whose parent isn't there. Raises OSError if the directory can't be
        read."""
        assert self._lock is not None
        found = look(self.path)
        self.damaged += len(found.damaged)
        for path in found.useless:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("a useless file in the state store can't be removed: %s", error)
        if found.damaged:
            log.warning("%d damaged files in the state store: %s", len(found.damaged), found.damaged[0])
        return found.blocks

    def remove(self, blocks: Collection[BlockFile]) -> None:
        """Removes the files of blocks; they don't come back after a power failure either. Raises OSError
        after having tried all of them."""
        assert self._lock is not None
        failures = []
        for block in blocks:
            try:
                block_file.remove(block)
            except OSError as error:
                failures.append(error)
        if blocks:
            self.sync()
        if failures:
            raise failures[0]

    def sync(self) -> None:
        """Writes the directory itself to the disk. Raises OSError."""
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@dataclass
class FoundBlocks:
    """`damaged`: what is wrong with each damaged file. `useless`: these and other files to be removed."""

    blocks: list[BlockFile] = field(default_factory=list)
    useless: list[Path] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def look(path: Path) -> FoundBlocks:
    """Reads all headers. Raises OSError."""
    found = FoundBlocks()
    with os.scandir(path) as entries:
        named = [entry for entry in entries if entry.name.endswith((SUFFIX, UNFINISHED))]
    # In the order of their creation, more or less, they lie one after the other on the disk.
    for entry in sorted(named, key=os.DirEntry.inode):
        file = path / entry.name
        if entry.name.endswith(UNFINISHED):
            found.useless.append(file)
            continue
        try:
            found.blocks.append(block_file.read_header(file))
        except FileNotFoundError:
            continue
        except (DamagedBlock, OSError) as error:
            if isinstance(error, OSError) and error.errno in NOT_THE_FILES:
                raise
            found.useless.append(file)
            found.damaged.append(str(error))
    found.blocks, orphans = _with_parents(found.blocks)
    found.useless += [block.path for block in orphans]
    return found


def _with_parents(blocks: Iterable[BlockFile]) -> tuple[list[BlockFile], list[BlockFile]]:
    """The blocks with all those before them, parents first, and the others."""
    ends = {"": 0}
    whole, orphans = [], []
    for block in sorted(blocks, key=lambda block: block.header.start):
        if ends.get(block.header.parent) == block.header.start:
            ends[block.header.address] = block.header.end
            whole.append(block)
        else:
            orphans.append(block)
    return whole, orphans
