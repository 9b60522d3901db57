"""What the store asks of files, whatever is in them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from headstart.caches.entry import Identity
from headstart.caches.file import identity_of


def identity_at(path: Path) -> Identity | None:
    """None where there is no file that can be looked at."""
    try:
        return identity_of(path.lstat())
    except OSError:
        return None


def sha256_of(path: Path) -> str:
    """Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """Returns when what was renamed or removed there is on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
