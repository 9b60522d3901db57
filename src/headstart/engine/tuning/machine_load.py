"""Observes other load on the machine during a measurement, as far as Linux reports it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

STATISTICS = Path("/proc/stat")
PRESSURE = Path("/proc/pressure/cpu")
TICKS = 100.0
# Shorter than this, the clock of the statistics is too coarse.
LEAST_SECONDS = 0.3
# Tolerated averages: CPUs used by other programs, CPUs that a hypervisor gives to other machines, and the
# share of time during which some program waits for a CPU.
MAX_OTHER_CPUS, MAX_STOLEN_CPUS, MAX_WAIT_SHARE = 0.25, 0.1, 0.3
# Between two groups of the same measurements.
PAUSE_SECONDS = 0.3


class Spent(NamedTuple):
    """Seconds since a fixed time: clock time, CPU time of other processes, CPU time taken by a hypervisor,
    and time during which some program waited for a CPU."""

    clock: float
    others: float = 0.0
    stolen: float = 0.0
    waited: float = 0.0


class Watch:
    """Observes one period after the other."""

    def __init__(self, look: Callable[[], Spent] | None = None) -> None:
        self._look = look or spent
        self._begun = self._look()

    def begin(self) -> None:
        self._begun = self._look()

    def doubt(self) -> str:
        """The other load since `begin` that makes times longer, in words; "" if there was none."""
        seconds, others, stolen, waited = (
            now - then for now, then in zip(self._look(), self._begun, strict=True)
        )
        if seconds < LEAST_SECONDS:
            return ""
        if others > MAX_OTHER_CPUS * seconds:
            return f"other programs used {others / seconds:.1f} CPUs"
        if stolen > MAX_STOLEN_CPUS * seconds:
            return f"other machines on this one used {stolen / seconds:.1f} of its CPUs"
        if waited > MAX_WAIT_SHARE * seconds:
            return f"programs waited for a CPU {100 * waited / seconds:.0f} % of the time"
        return ""

    def pause(self) -> None:
        time.sleep(PAUSE_SECONDS)


def spent() -> Spent:
    now = os.times()
    busy, stolen = _cpus()
    # Ticks are coarse, so the time of others may be slightly negative.
    return Spent(time.monotonic(), busy - now.user - now.system, stolen, _waited())


def _cpus() -> tuple[float, float]:
    """CPU seconds used, and CPU seconds taken by a hypervisor, on the CPUs that this process may use."""
    here = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)} if hasattr(os, "sched_getaffinity") else set()
    busy = stolen = 0.0
    try:
        for line in STATISTICS.read_text().splitlines():
            name, *fields = line.split()
            if name in here:
                user, nice, system, _, _, irq, softirq, steal = (int(field) for field in fields[:8])
                busy += user + nice + system + irq + softirq
                stolen += steal
    except (OSError, ValueError):
        return 0.0, 0.0
    return busy / TICKS, stolen / TICKS


def _waited() -> float:
    try:
        line = next(line for line in PRESSURE.read_text().splitlines() if line.startswith("some "))
        return int(line.rpartition("total=")[2]) / 1e6
    except (OSError, ValueError, StopIteration):
        return 0.0
