"""States in files of their own beside the cache's file, where the runtime that computes them writes and reads
nothing else.

    NAME.headstart                    the cache: its text, its token ids, and of each state size and hash
    NAME.rkllm_cache                  the state of its form for chats, as the NPU's runtime wrote it
    NAME@completion.rkllm_cache       that of its form for completions

The cache's file is the truth: what lies beside it without its hash is not used. It is put in its place first
and deleted last, so that whatever happens in between leaves a cache that is computed again from its text, and
never a state that belongs to nothing.
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
from headstart.regular_files import check_written, opened

CACHE_SUFFIX = ".headstart"
SUFFIX = ".rkllm_cache"
# No name has it, so no other cache's file is meant.
FORM_MARK = "@"


def state_path(path: Path, form: Form) -> Path:
    """Where the state of a form lies; `path` is that of the cache's file, or of one being written."""
    stem = path.name.removesuffix(CACHE_SUFFIX)
    return path.with_name(stem + ("" if form == "chat" else FORM_MARK + form) + SUFFIX)


def cache_path(path: Path) -> Path:
    """Of the cache that the state at `path` belongs to."""
    return path.with_name(path.name.removesuffix(SUFFIX).partition(FORM_MARK)[0] + CACHE_SUFFIX)


def hashed(path: Path, *, from_disk: bool = False) -> tuple[int, str]:
    """The file's size and hash. Raises OSError, also when it changes meanwhile or is a link."""
    with opened(path) as file:
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


def take(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, or a copy of it, as the file system can. Raises OSError."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except PermissionError:
        shutil.copyfile(source, target, follow_symlinks=False)
        with target.open("rb") as copied:
            os.fsync(copied.fileno())


def place(scratch: Path, final: Path, forms: Collection[Form]) -> None:
    """Puts the states of a cache in their places, its own file being in its, and deletes those that it has no
    more. Raises OSError."""
    for form in forms:
        state_path(scratch, form).replace(state_path(final, form))
    keep_only(final, forms)


def keep_only(path: Path, forms: Collection[Form] = ()) -> None:
    """Deletes the states beside the cache's file but for those of some forms. Raises OSError."""
    for form in FORMS:
        if form not in forms:
            # A folder of that name is no state.
            with suppress(IsADirectoryError):
                state_path(path, form).unlink(missing_ok=True)
