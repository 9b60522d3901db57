"""Reads states into memory before sequences start from them, on another thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from headstart.engine import state_file
from headstart.engine.draining import drained
from headstart.engine.sequence import Sequence
from headstart.protocol import StateRef

log = logging.getLogger(__name__)


class Reader:
    """Marks sequences as `reading` while their states are on the way. `wake` is called from its thread when
    one is there."""

    def __init__(self, wake: Callable[[], object]) -> None:
        self.wake = wake
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="state-reader")
        self.read: SimpleQueue[Sequence] = SimpleQueue()

    def begin(self, sequence: Sequence, state: StateRef) -> None:
        """Unless the state is in memory. A file that can't be looked at is none to wait for."""
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
        """Lets the sequences start whose states have been read."""
        for sequence in drained(self.read):
            sequence.reading = False
