"""What was measured of models on machines: `tuning.json` in the cache directory.

A file that is damaged or can't be written costs another measurement, and never a start.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from time import time

import msgspec
from msgspec import Struct

from headstart.arithmetic import Arithmetic, Tuning
from headstart.machine import available_cpus, cpu_model

log = logging.getLogger(__name__)

FILE = "tuning.json"


class Key(Struct, frozen=True):
    """What measured figures depend on. `weights` is the SHA-256 of the model file, `engine` the version,
    `threads` a number that was set, or 0."""

    weights: str
    engine: str
    cpu: str
    cpus: int
    threads: int

    @classmethod
    def here(cls, weights: str, engine: str, threads: int) -> Key:
        return cls(weights, engine, cpu_model(), available_cpus(), threads)


class Remembered(Struct, frozen=True):
    """`agreed`: the user took this arithmetic although caches had been computed with another."""

    key: Key
    measured: float
    tuning: Tuning
    agreed: bool = False


class _Content(Struct, frozen=True):
    tunings: list[Remembered]


class Tunings:
    """The file in `directory`, read when it is asked for something."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE

    def all(self) -> list[Remembered]:
        """Raises ValueError when the file is damaged, OSError when it can't be read."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=_Content).tunings
        except FileNotFoundError:
            return []
        except msgspec.MsgspecError as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error

    def known(self) -> list[Remembered]:
        try:
            return self.all()
        except (OSError, ValueError) as error:
            log.warning("what was measured before is not used: %s", error)
            return []

    def find(self, key: Key, wanted: Arithmetic) -> Tuning | None:
        """What was measured last with the arithmetic that measuring would choose of what is wanted."""
        tunings = (known.tuning for known in reversed(self.known()) if known.key == key)
        return next((tuning for tuning in tunings if tuning.arithmetic == tuning.best(wanted)), None)

    def agreed(self, key: Key) -> Arithmetic | None:
        """What the user agreed to."""
        agreed = (known for known in self.known() if known.key == key and known.agreed)
        return next((known.tuning.arithmetic for known in agreed), None)

    def put(self, key: Key, tuning: Tuning, *, agreed: bool = False) -> None:
        """Replaces what was known with this key and arithmetic; agreeing to one ends an earlier agreement to
        another. Only warns when the file can't be written."""
        kept = []
        for known in self.known():
            if known.key != key:
                kept.append(known)
            elif known.tuning.arithmetic != tuning.arithmetic:
                kept.append(msgspec.structs.replace(known, agreed=known.agreed and not agreed))
            else:
                agreed = agreed or known.agreed
        content = _Content([*kept, Remembered(key, time(), tuning, agreed)])
        try:
            _write(self.path, msgspec.json.format(msgspec.json.encode(content), indent=2))
        except OSError as error:
            log.warning("what was measured can't be kept in %s: %s", self.path, error)


def _write(path: Path, data: bytes) -> None:
    # Always the same name: whatever interrupts this, no more than one is left, and the next time takes it.
    scratch = path.with_name(f".{path.name}")
    flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW
    with os.fdopen(os.open(scratch, flags, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(path)
