"""Reads and writes states on threads of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from headstart.engine.core import state_file
from headstart.engine.core.sequence import Sequence
from headstart.engine.core.stats import stats
from headstart.protocol import Failed, FailureKind, Finished, RequestEvent, SaveTo, StateRef
from headstart.queues import drained

log = logging.getLogger(__name__)


class Reader:
    """Reads states into memory before sequences start from them, and marks these as `reading` meanwhile.
    `wake` is called from its thread after each."""

    def __init__(self, wake: Callable[[], object]) -> None:
        self.wake = wake
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="state-reader")
        self.read: SimpleQueue[Sequence] = SimpleQueue()

    def begin(self, sequence: Sequence, state: StateRef) -> None:
        """Starts reading, unless the state is in memory already or the file can't be opened."""
        try:
            if state_file.is_in_memory(state):
                return
        except OSError:
            return
        sequence.reading = True
        self.thread.submit(self._read, sequence, state)

    def _read(self, sequence: Sequence, state: StateRef) -> None:
        """Runs on the thread."""
        try:
            state_file.bring_into_memory(state)
        except OSError as error:
            log.warning("state not read from %s: %s", state.path, error)
        self.read.put(sequence)
        self.wake()

    def finish(self) -> None:
        """Marks the sequences whose states have been read as ready to start."""
        for sequence in drained(self.read):
            sequence.reading = False


class Writer:
    """Hashes and writes states, one after the other. `wake` is called from its thread after each."""

    def __init__(self, wake: Callable[[], object]) -> None:
        self.wake = wake
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="state-writer")
        self._written: SimpleQueue[RequestEvent] = SimpleQueue()

    def begin(self, sequence: Sequence, place: SaveTo, state: memoryview) -> None:
        self._pool.submit(self._write, sequence, place, state)

    def finished(self) -> Iterator[RequestEvent]:
        """The terminal events of sequences whose states have been written since the last call."""
        return drained(self._written)

    def _write(self, sequence: Sequence, place: SaveTo, state: memoryview) -> None:
        try:
            saved = state_file.write(place, state)
        except OSError as error:
            kind: FailureKind = "storage_full" if error.errno in state_file.NO_ROOM else "storage"
            self._written.put(Failed(sequence.request.id, kind, f"state not written: {error.strerror}"))
        else:
            account = stats(sequence, len(state), saved)
            self._written.put(Finished(sequence.request.id, "saved", account))
        self.wake()
