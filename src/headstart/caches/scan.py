"""Orphan files: those that are damaged beyond reading, or named after another cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from os.path import lexists
from pathlib import Path

from headstart.caches.cache_file import format, sidecar
from headstart.caches.cache_file.format import Corrupt
from headstart.caches.cache_file.sidecar import CACHE_SUFFIX
from headstart.caches.entry import Entry
from headstart.caches.store import SCRATCH
from headstart.names import CacheKey, Namespace
from headstart.regular_files import shown

ASIDE = ".damaged"


@dataclass(frozen=True)
class OrphanFile:
    """`why` it holds no cache. `damaged`: nothing can be read from it, not even its content."""

    path: Path
    why: str
    damaged: bool

    @property
    def key(self) -> CacheKey:
        """The key that the file's place and name stand for; it may be invalid."""
        return CacheKey(self.namespace, self.name)

    @property
    def namespace(self) -> Namespace:
        return Namespace(shown(self.path.parent.name))

    @property
    def model(self) -> str:
        return self.namespace.model

    @property
    def name(self) -> str:
        return shown(self.path.name.removesuffix(CACHE_SUFFIX))


def contents(directory: Path, *, whole: bool = False) -> Iterator[tuple[Path, Entry | OrphanFile]]:
    """Each file with its cache, or with the reason why it holds none. Only headers are read: states may be
    damaged or, unless only `whole` files count, truncated."""
    for path in sorted(directory.glob(f"*/*{CACHE_SUFFIX}")):
        try:
            entry = format.read(path, whole=whole)
        except FileNotFoundError:
            continue
        except Corrupt as error:
            yield path, OrphanFile(path, str(error), damaged=True)
        except OSError as error:
            yield path, OrphanFile(path, f"{shown(path)} can't be read: {error.strerror}", damaged=False)
        else:
            why = _misplaced(path, entry)
            yield path, OrphanFile(path, f"{shown(path)}: {why}", damaged=False) if why else entry
    for path in sorted(directory.glob(f"*/*{sidecar.SUFFIX}")):
        if not (path.name.startswith(SCRATCH) or lexists(sidecar.cache_path(path))):
            yield path, OrphanFile(path, f"{shown(path)}: holds a state whose cache is gone", damaged=True)


def _misplaced(path: Path, entry: Entry) -> str | None:
    """Why the file's content is no cache at this path; None if it is one."""
    key = CacheKey(Namespace(path.parent.name), path.name.removesuffix(CACHE_SUFFIX))
    if entry.key != key:
        return f"holds the cache {shown(entry.name)} of {shown(entry.model)}, so it is ignored"
    return None if key.is_valid else "no cache can have this name"


def orphan_files(directory: Path) -> list[OrphanFile]:
    return [found for _, found in contents(directory) if isinstance(found, OrphanFile)]


def set_aside(path: Path) -> Path:
    """Renames the file so that it no longer counts as a cache; returns the new path, which was free. Raises
    OSError."""
    number = 0
    while lexists(aside := path.with_name(path.name + ASIDE + (f"-{number}" if number else ""))):
        number += 1
    path.rename(aside)
    if path.name.endswith(CACHE_SUFFIX):
        # Its sidecar files belong to no cache any more.
        sidecar.keep_only(path)
    return aside


@dataclass(frozen=True)
class Scan:
    """Caches by model, and the faults of orphan files. Only headers are read: a state changed in place is
    detected when it is used."""

    entries: dict[str, list[Entry]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


def scan(directory: Path) -> Scan:
    found = Scan()
    for _, what in contents(directory, whole=True):
        if isinstance(what, OrphanFile):
            found.damaged.append(what.why)
        else:
            found.entries.setdefault(what.model, []).append(what)
    return found
