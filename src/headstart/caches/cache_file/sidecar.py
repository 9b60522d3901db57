"""Sidecar files: states in files of their own next to the cache file, for a runtime that can't write and read
them elsewhere.

    NAME.headstart                    the cache: its content, its token ids, size and hash of each state
    NAME.rkllm_cache                  the state of its chat form, as the NPU's runtime wrote it
    NAME@completion.rkllm_cache       the state of its completion form

The cache file is authoritative: a sidecar file is used only if its hash is in it. The cache file is put in
place first and deleted last, so that an interruption leaves a cache that is rebuilt from its content, and
never a state without a cache.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from blake3 import blake3

from headstart.caches.entry import FORMS, Form
from headstart.regular_files import check_written, open_file

CACHE_SUFFIX = ".headstart"
SUFFIX = ".rkllm_cache"
# No cache name contains it, so no other cache's file has this name.
FORM_SEPARATOR = "@"


def state_path(path: Path, form: Form) -> Path:
    """The path of a form's sidecar file; `path` is that of the cache file, or of one being written."""
    stem = path.name.removesuffix(CACHE_SUFFIX)
    return path.with_name(stem + ("" if form == "chat" else FORM_SEPARATOR + form) + SUFFIX)


def cache_path(path: Path) -> Path:
    """The path of the cache file to which the sidecar file at `path` belongs."""
    return path.with_name(path.name.removesuffix(SUFFIX).partition(FORM_SEPARATOR)[0] + CACHE_SUFFIX)


def hashed(path: Path, *, from_disk: bool = False) -> tuple[int, str]:
    """The file's size and hash. Raises OSError, also if the file changes meanwhile or is a link."""
    with open_file(path) as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = os.fstat(file.fileno())
        if before.st_size == 0:
            return 0, blake3().hexdigest()
        check_written(file)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping, memoryview(mapping) as view:
            found = blake3(view, max_threads=blake3.AUTO).hexdigest()
        after = os.fstat(file.fileno())
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise OSError(f"{path}: changed while it was being read")
    return before.st_size, found


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` a hard link to `source`, or a copy if the file system can't link. Raises OSError."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except PermissionError:
        shutil.copyfile(source, target, follow_symlinks=False)
        with target.open("rb") as copied:
            os.fsync(copied.fileno())


def place(scratch: Path, final: Path, forms: Collection[Form]) -> None:
    """Moves the states of a cache into place after its cache file, and deletes states that it no longer has.
    Raises OSError."""
    for form in forms:
        state_path(scratch, form).replace(state_path(final, form))
    keep_only(final, forms)


def keep_only(path: Path, forms: Collection[Form] = ()) -> None:
    """Deletes the sidecar files of the cache, except those of `forms`. Raises OSError."""
    for form in FORMS:
        if form not in forms:
            # A folder of that name is not a sidecar file.
            with suppress(IsADirectoryError):
                state_path(path, form).unlink(missing_ok=True)
