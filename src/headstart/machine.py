"""The machine and its processes: properties that affect speed, signals, commands. Nothing here fails; unknown
values get a fallback."""

from __future__ import annotations

import os
import platform
import signal
import sys
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
MEMORY_INFO = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")
TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def cpu_model() -> str:
    try:
        for line in CPU_INFO.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def available_cpus() -> int:
    """The number of CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_cores() -> int | None:
    """The number of cores behind the CPUs that this process may run on; None if unknown."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    try:
        return len({Path(TOPOLOGY.format(cpu)).read_text() for cpu in os.sched_getaffinity(0)})
    except OSError:
        return None


def available_bytes() -> int:
    """Memory that programs can still allocate, counting the page cache as free, within the limit of this
    process's control group."""
    available = memory_bytes()
    try:
        fields = dict(line.split(":", 1) for line in MEMORY_INFO.read_text().splitlines() if ":" in line)
        available = 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError, IndexError):
        pass
    try:
        limit, used = (int((CONTROL_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        counted = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
        available = min(available, limit - used + int(counted["file"]))
    except (OSError, ValueError, KeyError):
        # There is no limit, or it can't be read.
        pass
    return available


def allowed_memory_bytes() -> int:
    """The machine's memory, or less where the limit of this process's control group is lower."""
    try:
        return min(memory_bytes(), int((CONTROL_GROUP / "memory.max").read_text()))
    except (OSError, ValueError):
        return memory_bytes()


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def signal_name(number: int) -> str:
    """The name of a signal; `signal N` for most real-time signals, which have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this program in a new interpreter. -P: modules in the current folder
    are not imported; they are no part of the program."""
    return [sys.executable, "-P", "-m", module, *arguments]
