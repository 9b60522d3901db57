"""How much the state stores of all models may hold, and each model's share of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from headstart import machine
from headstart.config.settings import Settings
from headstart.engine.states.directory import total

# No model can have this name, so no namespace has this directory.
DIRECTORY = ".states"
MB = 1_000_000
MOST_MEMORY = 8_000 * MB
SMALL_MEMORY = 4 << 30
MOST_DISK = 20_000 * MB
SMALL_DISK = 8_000 * MB


@dataclass(frozen=True)
class TierLimit:
    """The most bytes of a tier, of all models; 0: the tier is off. `why`: how the figure was chosen; "": it
    is set."""

    n_bytes: int
    why: str = ""


class StateLimits(NamedTuple):
    """Bytes of each tier."""

    memory: int
    disk: int


def states_directory(cache_dir: Path) -> Path:
    return cache_dir.absolute() / DIRECTORY


def memory_limit(settings: Settings) -> TierLimit:
    if settings.state_memory_mb is not None:
        return TierLimit(int(settings.state_memory_mb * MB))
    there = machine.allowed_memory_bytes()
    if there <= SMALL_MEMORY:
        return TierLimit(there // 16, "a sixteenth of the memory")
    return _at_most(MOST_MEMORY, there // 8, "an eighth of the memory")


def disk_limit(settings: Settings) -> TierLimit:
    """Bytes that the stores hold already count as free, so that the limit doesn't fall as they grow."""
    if settings.state_disk_mb is not None:
        return TierLimit(int(settings.state_disk_mb * MB))
    free = _free_bytes(settings.cache_dir.absolute())
    free += sum(held(settings.cache_dir).values())
    if free < SMALL_DISK:
        return TierLimit(free // 20, "a twentieth of the free disk space")
    return _at_most(MOST_DISK, free // 10, "a tenth of the free disk space")


def _at_most(limit: int, n_bytes: int, why: str) -> TierLimit:
    return TierLimit(n_bytes, why) if n_bytes < limit else TierLimit(limit, "the most by default")


def _free_bytes(directory: Path) -> int:
    """Free space of the file system that the directory is on or will be on; 0 if unknown."""
    for place in (directory, *directory.parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            break
    return 0


def held(cache_dir: Path) -> dict[str, int]:
    """Bytes of the files in each model's directory."""
    try:
        with os.scandir(states_directory(cache_dir)) as folders:
            paths = [Path(folder.path) for folder in folders if folder.is_dir(follow_symlinks=False)]
    except OSError:
        return {}
    return {path.name: total(path) for path in paths}


def shares(limit: int, wanted: Mapping[str, int]) -> dict[str, int]:
    """Divides a tier's limit: nobody gets less than an equal part because another wants more, and a model
    that wants less leaves the rest to the others."""
    found: dict[str, int] = {}
    left = limit
    for n_served, name in enumerate(sorted(wanted, key=lambda name: wanted[name])):
        found[name] = min(wanted[name], left // (len(wanted) - n_served))
        left -= found[name]
    return found


def with_rest(limit: int, shared: Mapping[str, int], names: Collection[str]) -> dict[str, int]:
    """The shares with the limit's unused rest divided among `names`."""
    rest = max(limit - sum(shared.values()), 0) // max(len(names), 1)
    return {name: n_bytes + (rest if name in names else 0) for name, n_bytes in shared.items()}
