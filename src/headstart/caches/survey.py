"""The cache directory as it is, without owning it: nothing is locked, nothing changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from headstart.caches import file
from headstart.caches.entry import Entry
from headstart.caches.file import Corrupt
from headstart.caches.store import SUFFIX


@dataclass(frozen=True)
class Survey:
    """Caches by model, and what is wrong with the files that hold none. Only headers are read: states that
    were changed in place are found when they are used."""

    entries: dict[str, list[Entry]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


def survey(directory: Path) -> Survey:
    found = Survey()
    for path in sorted(directory.glob(f"*/*{SUFFIX}")):
        try:
            entry = file.read(path)
        except FileNotFoundError:
            continue
        except (Corrupt, OSError) as error:
            found.damaged.append(str(error))
            continue
        if (entry.shelf, entry.name + SUFFIX) != (path.parent.name, path.name):
            found.damaged.append(f"{path}: holds the cache {entry.name} of {entry.model}, so it is ignored")
            continue
        found.entries.setdefault(entry.model, []).append(entry)
    return found
