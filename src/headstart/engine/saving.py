"""Writing states beside the engine's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from headstart.engine import state_file
from headstart.engine.accounts import stats
from headstart.engine.draining import drained
from headstart.engine.sequence import Sequence
from headstart.protocol import Failed, FailureKind, Finished, RequestEvent, SaveTo


class Writer:
    """Hashes and writes states one after the other on another thread, from which `wake` is called after
    each."""

    def __init__(self, wake: Callable[[], object]) -> None:
        self.wake = wake
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="state-writer")
        self._written: SimpleQueue[RequestEvent] = SimpleQueue()

    def begin(self, sequence: Sequence, place: SaveTo, state: memoryview) -> None:
        self._pool.submit(self._write, sequence, place, state)

    def finished(self) -> Iterator[RequestEvent]:
        """The ends of the sequences whose states have been written since."""
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
