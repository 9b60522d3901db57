"""The disk tier: writes blocks behind the engine's back, and reads them before they are needed."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from time import time

from headstart.engine.states import block_file
from headstart.engine.states.block import Block
from headstart.engine.states.block_directory import BlockDirectory, directory_of
from headstart.engine.states.block_file import BlockFile, BlockHeader, DamagedBlock
from headstart.queues import drained

log = logging.getLogger(__name__)

# An upper bound of what a file takes besides values and checkpoint: header, and 4 bytes per token.
HEADER_BYTES = 4096
Content = tuple[memoryview, memoryview]


@dataclass(frozen=True, slots=True)
class ReadBlocks:
    """The data and checkpoint of each block that was read for `reader`, or the error."""

    reader: object
    found: Sequence[tuple[Block, Content | Exception]]


class DiskTier:
    """The blocks of one model in `path`, the model's directory. Used from the engine's thread; two threads of
    its own write and read. `wake` is called from them after each piece of work. `root`: as in StateStore.
    `limit`: bytes."""

    def __init__(self, path: Path, root: str, limit: int, wake: Callable[[], object]) -> None:
        self.directory = BlockDirectory(directory_of(path, root))
        self.root = root
        self.limit = limit
        self.wake = wake
        self.is_ready = False
        self.failures = 0
        self.writing: dict[Block, int] = {}
        # Blocks that could not be written are not tried again.
        self.refused: set[Block] = set()
        # Blocks used since their files' times were set.
        self.used: set[Block] = set()
        self._stored = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="block-writer")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="block-reader")
        self._written: SimpleQueue[tuple[Block, BlockFile | Exception]] = SimpleQueue()
        self._pending: set[Future[None]] = set()
        self.loaded: SimpleQueue[ReadBlocks] = SimpleQueue()

    @property
    def writing_bytes(self) -> int:
        """Bytes in memory of the blocks that are being written."""
        return sum(block.memory_bytes for block in self.writing)

    @property
    def n_bytes(self) -> int:
        """Bytes of all files, and the most that those being written take."""
        return self._stored + sum(self.writing.values())

    def open(self) -> list[Block]:
        """The blocks in the directory, each after its parent, which it then owns; none while another process
        owns it."""
        try:
            self.is_ready = self.directory.acquire()
            found = self.directory.scan() if self.is_ready else []
        except OSError as error:
            log.warning("stored states can't be used: %s", error)
            return []
        blocks = [_block(file) for file in found]
        self._stored = sum(file.size for file in found)
        return blocks

    @staticmethod
    def size_of(block: Block) -> int:
        """An upper bound of the size of the block's file."""
        return block.n_data + block.n_checkpoint + 4 * len(block.tokens) + HEADER_BYTES

    def write(self, block: Block) -> None:
        """Begins to write a block; those before it were written or are being written."""
        assert block.data is not None
        block.address = block.address or self._address(block)
        checkpoint = block.checkpoint if block.lasting else None
        header = BlockHeader(
            address=block.address,
            parent=block.parent_address,
            root=self.root,
            start=block.start,
            owner=block.owner,
            cuts=block.cuts,
            run=block.run,
            tokens=block.tokens,
            data_bytes=len(block.data),
            checkpoint_bytes=0 if checkpoint is None else len(checkpoint),
            created=time(),
        )
        self.writing[block] = self.size_of(block)
        future = self._writer.submit(self._write, block, header, block.data, checkpoint or memoryview(b""))
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)

    def _address(self, block: Block) -> str:
        before = block.parent_address
        return block_file.address_of(
            before, self.root, block.owner, block.start, block.tokens, block.cuts, block.run
        )

    def _write(self, block: Block, header: BlockHeader, data: memoryview, checkpoint: memoryview) -> None:
        """Runs on the writer's thread."""
        try:
            self._written.put((block, block_file.write(self.directory.path, header, data, checkpoint)))
        except Exception as error:
            # Any exception: the block must not count as being written for ever.
            self._written.put((block, error))
        self.wake()

    def settle(self) -> None:
        """Records what has been written since the last call."""
        for block, result in drained(self._written):
            self.writing.pop(block, None)
            if isinstance(result, Exception):
                self.failures += 1
                self.refused.add(block)
                log.warning("a state was not written to the disk: %s", result)
                continue
            self._stored += result.size
            block.file = result
            if block.gone:
                self.remove(block)

    def remove(self, block: Block) -> None:
        """Deletes the block's file; one that is being written is deleted by `settle`."""
        self.used.discard(block)
        self.refused.discard(block)
        if block.file is None:
            return
        try:
            block_file.remove(block.file)
        except OSError as error:
            log.warning("a stored state can't be deleted: %s", error)
        self._stored -= block.file.size
        block.file = None

    def sync(self) -> None:
        """Makes deletions last, also through a power failure."""
        if self.is_ready:
            self.directory.sync()

    def wait_written(self) -> None:
        """Returns when no file is being written."""
        wait(set(self._pending))

    def read(self, reader: object, blocks: Sequence[Block]) -> None:
        """Begins to read blocks that have files; the result arrives in `loaded`."""
        files = [(block, block.file) for block in blocks if block.file]
        self._reader.submit(self._read, reader, files)

    def _read(self, reader: object, files: Sequence[tuple[Block, BlockFile]]) -> None:
        """Runs on the reader's thread."""
        found: list[tuple[Block, Content | Exception]] = []
        for block, file in files:
            try:
                found.append((block, block_file.read(file)))
            except (OSError, DamagedBlock) as error:
                found.append((block, error))
                break
        self.loaded.put(ReadBlocks(reader, found))
        self.wake()

    def finished(self) -> Iterator[ReadBlocks]:
        """Everything read since the last call."""
        return drained(self.loaded)

    def touch_used(self) -> None:
        """Notes the last use of the blocks used since the last call in their files' times."""
        for block in self.used:
            if block.file:
                block_file.touch(block.file)
        self.used.clear()

    def close(self, seconds: float) -> None:
        """Waits for what is being written, at most so long."""
        wait(set(self._pending), timeout=seconds)
        self.touch_used()


def _block(file: BlockFile) -> Block:
    header = file.header
    return Block(
        start=header.start,
        tokens=array("i", header.tokens),
        owner=header.owner,
        cuts=header.cuts,
        run=header.run,
        address=header.address,
        file=file,
        n_data=header.data_bytes,
        n_checkpoint=header.checkpoint_bytes,
        last_used=file.used,
    )
