"""Files among the caches that hold none: damaged beyond reading, or named after another cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headstart.caches import beside, file
from headstart.caches.beside import CACHE_SUFFIX
from headstart.caches.entry import Entry
from headstart.caches.file import Corrupt
from headstart.caches.store import SCRATCH

ASIDE = ".damaged"


@dataclass(frozen=True)
class Stray:
    """`why` it holds no cache. `damaged`: nothing can be read from it, its prompt neither."""

    path: Path
    why: str
    damaged: bool

    @property
    def shelf(self) -> str:
        return self.path.parent.name

    @property
    def model(self) -> str:
        return self.shelf.partition("@")[0]

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(CACHE_SUFFIX)


def contents(directory: Path, *, whole: bool = False) -> Iterator[tuple[Path, Entry | Stray]]:
    """Each file with the cache it holds, or why it holds none, by its header alone: the states of a cache may
    be damaged, or, unless only `whole` files count, cut off."""
    for path in sorted(directory.glob(f"*/*{CACHE_SUFFIX}")):
        try:
            entry = file.read(path, whole=whole)
        except FileNotFoundError:
            continue
        except Corrupt as error:
            yield path, Stray(path, str(error), damaged=True)
        except OSError as error:
            yield path, Stray(path, f"{path} can't be read: {error.strerror}", damaged=False)
        else:
            if (entry.shelf, entry.name + CACHE_SUFFIX) == (path.parent.name, path.name):
                yield path, entry
            else:
                why = f"{path}: holds the cache {entry.name} of {entry.model}, so it is ignored"
                yield path, Stray(path, why, damaged=False)
    for path in sorted(directory.glob(f"*/*{beside.SUFFIX}")):
        if not (path.name.startswith(SCRATCH) or beside.cache_path(path).exists()):
            yield path, Stray(path, f"{path}: holds a state whose cache is gone", damaged=True)


def strays(directory: Path) -> list[Stray]:
    return [found for _, found in contents(directory) if isinstance(found, Stray)]


def set_aside(path: Path) -> Path:
    """Renames the file so that it is taken for no cache; its new path, which was free. Raises OSError."""
    number = 0
    while (aside := path.with_name(path.name + ASIDE + (f"-{number}" if number else ""))).exists():
        number += 1
    path.rename(aside)
    if path.name.endswith(CACHE_SUFFIX):
        # Whatever lies beside it belongs to nothing any more.
        beside.keep_only(path)
    return aside
