"""Compiles the grammars of sequences on a thread, before the sequences start."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from headstart.engine.core.sequence import Sequence
from headstart.engine.grammar import STACK_BYTES, GrammarError, Grammars
from headstart.queues import drained
from headstart.round_robin import RoundRobin


class Compiler:
    """Gives sequences their matchers, and marks them as `compiling` until then; owners take turns. `wake` is
    called from its thread after each. The thread starts at the first grammar."""

    def __init__(self, grammars: Grammars, wake: Callable[[], object]) -> None:
        self.grammars = grammars
        self.wake = wake
        self.waiting: RoundRobin[Sequence] = RoundRobin()
        self.changed = threading.Condition()
        self.done: SimpleQueue[tuple[Sequence, str]] = SimpleQueue()
        self.started = False

    def begin(self, sequence: Sequence) -> None:
        if not sequence.request.sampling.grammar:
            return
        sequence.compiling = True
        with self.changed:
            self.waiting.put(sequence.request.owner, sequence)
            self.changed.notify()
        if not self.started:
            self.started = True
            _start(self._run)

    def _run(self) -> None:
        """Runs on the thread."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: len(self.waiting))
                sequence = self.waiting.take()
            fault = ""
            try:
                sequence.matcher = self.grammars.compile(sequence.request.sampling.grammar)
            except GrammarError as error:
                fault = str(error)
            self.done.put((sequence, fault))
            self.wake()

    def finish(self) -> Iterator[tuple[Sequence, str]]:
        """Marks the sequences whose grammars have been compiled as ready to start; yields those with a faulty
        grammar, and the fault."""
        for sequence, fault in drained(self.done):
            sequence.compiling = False
            if fault:
                yield sequence, fault


def _start(run: Callable[[], None]) -> None:
    """Starts the thread. The stack size applies to threads started after it is set, so it is reset
    afterwards."""
    usual = threading.stack_size(STACK_BYTES)
    threading.Thread(target=run, name="grammar-compiler", daemon=True).start()
    threading.stack_size(usual)
