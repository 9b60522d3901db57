"""Limits of the prompt process: memory in total, processor time for a template and for a whole request."""

from __future__ import annotations

import resource
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType

from headstart.prompt.template import OutOfTime

# In addition to what Python and its libraries take; the largest vocabularies need a third of it.
MEMORY_BYTES = 1536 << 20
TEMPLATE_SECONDS = 2.0
LOAD_SECONDS = 60.0
REQUEST_SECONDS = 5.0
# Long runs of white space take llama.cpp longest, 1.4 µs a byte; and prefixes are tokenised twice.
SECONDS_PER_BYTE = 8e-6


def limit_memory() -> None:
    """Limits the process's memory: allocations beyond it fail with MemoryError or end the process."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    most = pages * resource.getpagesize() + MEMORY_BYTES
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def end_after(seconds: float) -> None:
    """The kernel ends the process after so many seconds of processor time; 0 removes the limit. Processor
    time doesn't depend on how busy the machine is."""
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)


class TemplateTime:
    """Context in which a template runs; raises OutOfTime in it once all runs since `renew` together have used
    up their time."""

    def __init__(self) -> None:
        self.left = TEMPLATE_SECONDS
        self._runs = False
        signal.signal(signal.SIGPROF, self._ring)

    def renew(self) -> None:
        self.left = TEMPLATE_SECONDS

    def __enter__(self) -> None:
        if self.left <= 0:
            raise self._error()
        self._runs = True
        signal.setitimer(signal.ITIMER_PROF, self.left)

    def __exit__(self, *_: object) -> None:
        self._runs = False
        self.left = signal.setitimer(signal.ITIMER_PROF, 0)[0]

    def _ring(self, _number: int, _frame: FrameType | None) -> None:
        if self._runs:
            self._runs = False
            raise self._error()

    def _error(self) -> OutOfTime:
        return OutOfTime(f"it runs for more than {TEMPLATE_SECONDS:g} seconds")
