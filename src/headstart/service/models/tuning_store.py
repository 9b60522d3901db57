"""Stored measurements of models on machines: `tuning.json` in the cache directory.

A damaged or unwritable file costs another measurement and never prevents a start. Its content is not trusted:
impossible values make the file damaged.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from time import time

import msgspec
from msgspec import Struct

from headstart.machine import available_cpus, cpu_model
from headstart.numerics import Numerics, Tuning

log = logging.getLogger(__name__)

FILE = "tuning.json"
# A measurement takes some 5,000 bytes.
MOST_BYTES = 4 << 20


class Key(Struct, frozen=True):
    """Everything that a measurement depends on. `weights` is the SHA-256 of the model file, `engine` its
    version, `threads` the configured number, or 0."""

    weights: str
    engine: str
    cpu: str
    cpus: int
    threads: int

    @classmethod
    def here(cls, weights: str, engine: str, threads: int) -> Key:
        return cls(weights, engine, cpu_model(), available_cpus(), threads)


class Remembered(Struct, frozen=True):
    """A stored measurement. `agreed`: the user accepted these numerics although caches had been computed with
    others. `overrides`: measuring chose them although caches have others, which were computed while it was in
    doubt."""

    key: Key
    measured: float
    tuning: Tuning
    agreed: bool = False
    overrides: bool = False


class Doubted(Struct, frozen=True):
    """The last of several unreliable tries, with the best figures of all of them."""

    key: Key
    measured: float
    tuning: Tuning


class _Content(Struct, frozen=True):
    tunings: list[Remembered]
    doubted: list[Doubted] = []


NOTHING = _Content([])


class Tunings:
    """The file in `directory`, read at each call."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE

    def all(self) -> list[Remembered]:
        """The reliable measurements. Raises ValueError if the file is damaged, OSError if it can't be
        read."""
        return self._read().tunings

    def _read(self) -> _Content:
        try:
            content = msgspec.json.decode(_bytes_of(self.path), type=_Content)
        except FileNotFoundError:
            return NOTHING
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error
        for tuning in [known.tuning for known in content.tunings] + [one.tuning for one in content.doubted]:
            if fault := _fault(tuning):
                raise ValueError(f"{self.path} is damaged: {fault}")
        return content

    def _known(self) -> _Content:
        try:
            return self._read()
        except (OSError, ValueError) as error:
            log.warning("stored measurements are not used: %s", error)
            return NOTHING

    def known(self) -> list[Remembered]:
        return list(self._known().tunings)

    def find(self, key: Key, allowed: Numerics) -> Tuning | None:
        """The latest measurement with the numerics that measuring would choose within `allowed`."""
        tunings = (known.tuning for known in reversed(self.known()) if known.key == key)
        return next((tuning for tuning in tunings if _is_choice(tuning, allowed)), None)

    def doubted(self, key: Key) -> Tuning | None:
        """The unreliable measurement of this key, which another try may improve."""
        return next((known.tuning for known in self._known().doubted if known.key == key), None)

    def overriding(self, key: Key) -> Numerics | None:
        """The numerics that caches are rebuilt with because a reliable repeated measurement chose them."""
        found = (known for known in self.known() if known.key == key and known.overrides)
        return next((known.tuning.numerics for known in found), None)

    def agreed(self, key: Key) -> Numerics | None:
        """The numerics that the user agreed to."""
        agreed = (known for known in self.known() if known.key == key and known.agreed)
        return next((known.tuning.numerics for known in agreed), None)

    def put(self, key: Key, tuning: Tuning, *, agreed: bool = False, overrides: bool = False) -> None:
        """Replaces the measurement with this key and numerics, and unreliable ones of this key. Agreeing to
        one choice of numerics, or overriding with one, ends that of another. An unreliable measurement is
        only kept for the next try. Only warns if the file can't be written."""
        content = self._known()
        doubted = [known for known in content.doubted if known.key != key]
        if not tuning.counts:
            self._keep(_Content(content.tunings, [*doubted, Doubted(key, time(), tuning)]))
            return
        kept = []
        for known in content.tunings:
            if known.key != key:
                kept.append(known)
            elif known.tuning.numerics == tuning.numerics:
                agreed, overrides = agreed or known.agreed, overrides or known.overrides
            elif known.tuning.is_final or known.agreed:
                mine = {"agreed": known.agreed and not agreed, "overrides": known.overrides and not overrides}
                kept.append(msgspec.structs.replace(known, **mine))
        self._keep(_Content([*kept, Remembered(key, time(), tuning, agreed, overrides)], doubted))

    def forget(self, key: Key) -> None:
        """Deletes the measurements of this key: the model is measured again at its next start."""
        content = self._known()
        tunings = [known for known in content.tunings if known.key != key]
        self._keep(_Content(tunings, [known for known in content.doubted if known.key != key]))

    def _keep(self, content: _Content) -> None:
        try:
            _write(self.path, msgspec.json.format(msgspec.json.encode(content), indent=2))
        except OSError as error:
            log.warning("the measurement can't be stored in %s: %s", self.path, error)


def _bytes_of(path: Path) -> bytes:
    """Raises OSError, or ValueError for a file that is not a regular one (reading a named pipe would block)
    or is too large."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError(f"{path} is damaged: it is no regular file")
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path} is damaged: it has more than {MOST_BYTES} bytes")
    return data


def _is_choice(tuning: Tuning, allowed: Numerics) -> bool:
    """Whether it was measured with the requested numerics, and with no more threads than CPUs."""
    fits = allowed.allows(tuning.numerics) and tuning.threads <= available_cpus()
    # Measuring may have stayed with the numerics of the caches where little was to be gained.
    return fits and tuning.numerics == tuning.best(allowed)


def _fault(tuning: Tuning) -> str:
    """The inconsistency between its values; "" for none."""
    if not all(tried.is_whole for tried in (tuning.numerics, *tuning.ranking)):
        return "incomplete numerics"
    if tuning.hits and len(tuning.hits) != len(tuning.ranking):
        return "hits that differ from the ranking"
    if not _are_plain((*tuning.measured, *tuning.doubts, *tuning.doubts.values())):
        return "a text that can't be printed"
    return ""


def _are_plain(texts: Sequence[str]) -> bool:
    return all(text.isprintable() for text in texts)


def _write(path: Path, data: bytes) -> None:
    # Always the same name: after an interruption at most one is left, and the next write reuses it.
    scratch = path.with_name(f".{path.name}")
    flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW
    with os.fdopen(os.open(scratch, flags, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(path)
