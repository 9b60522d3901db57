"""A cache file while it is being written.

Space for the header is reserved at the start, so that each state can go to the disk once it is computed; the
header with the hashes is written last. Until then `format.read` rejects the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from headstart.caches.cache_file import format
from headstart.caches.cache_file.format import StatePart
from headstart.caches.cache_file.header import BESIDE, LENGTH, NO_HASH, hashed, header_text
from headstart.caches.cache_file.sidecar import hashed as hashed_file
from headstart.caches.cache_file.sidecar import link_or_copy, state_path
from headstart.caches.entry import Entry, Form

ALIGN = 64
# Larger than any offset, to compute the longest possible header.
FAR = 10**15
# Room for longer times, and for later changes of the retention.
SPARE = 1024


class CacheWriter:
    """Writes the empty, existing file at `path`. `entry` and the token ids of each form must be known from
    the start; `finish` may get the entry with other times. A state's position is given by `place`: `copy`
    writes it there, or the caller does and then calls `wrote`. Methods raise OSError, after which the file is
    in an unknown state.

    `in_sidecars`: each state is a sidecar file. `end`: the position of the next state in the cache file
    otherwise."""

    def __init__(
        self, path: Path, entry: Entry, tokens: Mapping[Form, list[int]], *, in_sidecars: bool = False
    ) -> None:
        self.path = path
        self.in_sidecars = in_sidecars
        self.tokens = dict(tokens)
        self._tensors: dict[str, dict[str, Any]] = {}
        self._hashes: dict[str, str] = {}
        self._sizes: dict[Form, int] = {}
        ids = {form: _int32(tokens) for form, tokens in tokens.items()}
        at = 0
        for form, data in ids.items():
            self._tensors[f"{form}.tokens"] = _tensor("I32", len(data) // 4, at, len(data))
            self._hashes[f"blake3 {form}.tokens"] = blake3(data).hexdigest()
            at += len(data)
        self._room = self._header_room(entry)
        self.end = LENGTH.size + self._room + at
        self._write(b"".join(ids.values()), LENGTH.size + self._room)

    def _header_room(self, entry: Entry) -> int:
        far = {f"{form}.state": _tensor("U8", FAR, FAR, FAR) for form in self.tokens}
        # A hash is longer than the size that is written for a sidecar file.
        hashes = {f"blake3 {form}.state": NO_HASH for form in self.tokens}
        return room_for(len(header_text(entry, self._tensors | far, self._hashes | hashes)))

    def place(self, form: Form) -> tuple[Path, int]:
        """The file and the offset of the form's state, which must be the next one written."""
        return (state_path(self.path, form), 0) if self.in_sidecars else (self.path, self.end)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self.end + sum(self._sizes.values())

    def wrote(self, form: Form, size: int, blake3_hex: str) -> None:
        """Records that the form's state, `size` bytes with this hash, is on the disk in its place."""
        if self.in_sidecars:
            self._sizes[form] = size
            self._hashes |= {f"{BESIDE}{form}.state": str(size), f"blake3 {form}.state": blake3_hex}
            return
        begin = self.end - LENGTH.size - self._room
        self._tensors[f"{form}.state"] = _tensor("U8", size, begin, size)
        self._hashes[f"blake3 {form}.state"] = blake3_hex
        self.end += size

    def copy(self, form: Form, part: StatePart) -> None:
        """Copies the form's state from another file."""
        if self.in_sidecars:
            place, _ = self.place(form)
            link_or_copy(part.path, place)
            self.wrote(form, *hashed_file(place))
            return
        with format.mapped(part) as state:
            self._write(state, self.end)
            self.wrote(form, part.size, format.hash_of(state))

    def finish(self, entry: Entry) -> Entry:
        """Writes the header, after all states, and syncs; returns the entry with its forms and identity
        filled in."""
        text = header_text(entry, self._tensors, self._hashes)
        assert len(text) <= self._room
        text = hashed(text + b" " * (self._room - len(text)))
        self._write(LENGTH.pack(len(text)) + text, 0)
        with self.path.open("rb") as whole:
            os.fsync(whole.fileno())
        return format.read(self.path)

    def _write(self, data: bytes | memoryview, at: int) -> None:
        with os.fdopen(os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW), "wb") as output:
            output.seek(at)
            output.write(data)


def expected_size(entry: Entry, n_tokens: int) -> int:
    """Upper bound of the cache file's size with `n_tokens` ids, without its states."""
    return room_for(len(header_text(entry, {}, {}))) + SPARE + 4 * n_tokens


def room_for(length: int) -> int:
    """The bytes to reserve for a header of this length, so that the data after it is aligned."""
    room = length + SPARE
    return room + -(LENGTH.size + room) % ALIGN


def _tensor(dtype: str, n: int, at: int, size: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [n], "data_offsets": [at, at + size]}


def _int32(tokens: list[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little", signed=True) for token in tokens)
