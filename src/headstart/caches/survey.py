"""The cache directory as it is, without owning it: nothing is locked, nothing changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from headstart.caches.entry import Entry
from headstart.caches.strays import Stray, contents


@dataclass(frozen=True)
class Survey:
    """Caches by model, and what is wrong with the files that hold none. Only headers are read: states that
    were changed in place are found when they are used."""

    entries: dict[str, list[Entry]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


def survey(directory: Path) -> Survey:
    found = Survey()
    for _, what in contents(directory, whole=True):
        if isinstance(what, Stray):
            found.damaged.append(what.why)
        else:
            found.entries.setdefault(what.model, []).append(what)
    return found
