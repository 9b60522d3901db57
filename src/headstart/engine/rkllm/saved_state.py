"""Checks the file into which the runtime should have saved a state: the runtime doesn't report whether it
did."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

from blake3 import blake3

from headstart.engine.model import ModelError
from headstart.protocol import FailureKind
from headstart.regular_files import open_file

# The file resembles llama.cpp's session file: a magic number, a version, the number of tokens, the ids.
HEAD = Struct("<3I")
# The prompt's last token may be missing, and tokens of an answer aborted at its first may be included.
FEWER, MORE = 1, 64
LITTLE_ROOM = 1 << 20
READ_BYTES = 4 << 20


@dataclass(frozen=True)
class Written:
    nbytes: int
    blake3: str


class NotWritten(ModelError):
    """`kind`: "storage_full" if the disk is full or nearly full."""

    def __init__(self, message: str, kind: FailureKind) -> None:
        super().__init__(message)
        self.kind = kind


def check(path: Path, n_tokens: int) -> Written:
    """Syncs the file to the disk and returns its size and hash. Raises NotWritten if it doesn't exist or has
    another number of tokens than about `n_tokens`, or OSError."""
    try:
        with open_file(path) as file:
            os.fchmod(file.fileno(), 0o600)
            head = file.read(HEAD.size)
            found = HEAD.unpack(head)[2] if len(head) == HEAD.size else 0
            if not n_tokens - FEWER <= found <= n_tokens + MORE:
                raise not_written(
                    path, f"the NPU runtime saved a state of {found} tokens instead of {n_tokens}"
                )
            os.fdatasync(file.fileno())
            file.seek(0)
            hasher, size = blake3(), 0
            while data := file.read(READ_BYTES):
                hasher.update(data)
                size += len(data)
    except FileNotFoundError:
        raise not_written(
            path,
            "the NPU runtime saved no state, which it can't of some models (RWKV; Qwen3.5 with 1.3.0)",
        ) from None
    return Written(size, hasher.hexdigest())


def not_written(path: Path, message: str) -> NotWritten:
    """Returns the error to raise. Raises OSError if the folder is gone."""
    if shutil.disk_usage(path.parent).free < LITTLE_ROOM:
        return NotWritten(f"{message}: the disk is full", "storage_full")
    return NotWritten(message, "engine")
