"""Drops files from the page cache, as if the machine had just been started."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from bench.client import BenchFailed
from headstart.engine.core.state_file import resident_pages

SUFFIXES = {".headstart", ".bin", ".gguf"}
# What asking for it may bring back.
LEFT = 0.05


def drop(model: str, states: Path) -> None:
    """The model's weights, and the states and converted weights under `states`, none of which a running
    process may have mapped. Raises BenchFailed if they are still there."""
    for path in (Path(model), *(found for found in states.rglob("*") if found.suffix in SUFFIXES)):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if resident_share(path) > LEFT:
                raise BenchFailed(f"the page cache keeps {path.name}")


def resident_share(path: Path) -> float:
    """How much of a file is in the page cache; 0 to 1."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        resident, others = resident_pages(mapping, 0, len(mapping))
    return resident / (resident + others)
