"""What the results depend on besides the code: said with them."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import headstart


def described(model: str, threads: int, peer: Path) -> dict[str, Any]:
    """The machine, the versions and the model; the load average is that of now."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "memory_gb": round(memory, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
        "threads": threads,
        "model": Path(model).name,
        "headstart": headstart.__version__,
        "llama-cpp-python": version("llama-cpp-python"),
        "llama-server": _peer_version(peer),
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _peer_version(peer: Path) -> str:
    if not peer.exists():
        return "none"
    result = subprocess.run([peer, "--version"], capture_output=True, text=True, check=False)
    return " ".join((result.stdout + result.stderr).split())
