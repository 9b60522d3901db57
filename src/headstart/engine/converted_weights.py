"""Files of converted weights: `<directory>/<source>-q8_0-<hash>.gguf`. The name has the SHA-256 of the source
and the BLAKE3 hash of the content, so that a damaged or unfinished file is not used.

`conversions` is `<directory>/<source>`: the directory, and the first part of the names.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from headstart.regular_files import is_file

log = logging.getLogger(__name__)

# No model can have this name, so no namespace has this directory.
DIRECTORY = ".weights"
HASH_DIGITS = 32
# Always the same name, so that interrupted conversions leave one file at most.
SCRATCH = ".unfinished.gguf"


def conversions_of(source_sha256: str, cache_dir: Path) -> str:
    return str(cache_dir.absolute() / DIRECTORY / source_sha256[:HASH_DIGITS])


def found(conversions: str) -> list[Path]:
    """The existing files, unverified."""
    start = Path(conversions)
    paths = sorted(start.parent.glob(f"{start.name}-q8_0-*.gguf")) if conversions else []
    return [path for path in paths if is_file(path)]


def obtain(conversions: str, make: Callable[[Path], None]) -> Path:
    """The verified file; `make` writes it if no file has the hash in its name. Raises OSError, and the errors
    of `make`."""
    directory = Path(conversions).parent
    with _locked(directory):
        for path in found(conversions):
            if path.stem.endswith(f"-{_hash(path)}"):
                return path
            log.warning("%s is damaged: it is converted again", path)
            path.unlink()
        scratch = directory / SCRATCH
        scratch.unlink(missing_ok=True)
        try:
            os.close(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            make(scratch)
            _sync(scratch)
            path = Path(f"{conversions}-q8_0-{_hash(scratch)}.gguf")
            scratch.rename(path)
            _sync(directory)
        finally:
            scratch.unlink(missing_ok=True)
        return path


def discard(conversions: str) -> None:
    """Deletes the files. A process that has one of them open can still use it."""
    for path in found(conversions):
        path.unlink(missing_ok=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Admits one process at a time: two models may have the same weights, and `headstart doctor` may measure
    while a server runs."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _hash(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()[:HASH_DIGITS]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
