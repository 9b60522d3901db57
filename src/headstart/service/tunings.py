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

from headstart.machine import available_cpus, cpu_model
from headstart.messages import Tuning

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
    """`agreed`: the user took this flash attention although caches had been computed with the other."""

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

    def find(self, key: Key, flash_attention: bool | None) -> Remembered | None:
        """What was measured last, with this flash attention where one is given; else what the user agreed to,
        or what measuring chose."""
        found = [known for known in self.known() if known.key == key]
        if flash_attention is not None:
            found = [known for known in found if known.tuning.flash_attention == flash_attention]
            return found[-1] if found else None
        return next((known for known in found if known.agreed), None) or next(
            (known for known in reversed(found) if _is_chosen(known.tuning)), None
        )

    def put(self, key: Key, tuning: Tuning, *, agreed: bool = False) -> None:
        """Replaces what was known with this key and flash attention; agreeing to one ends an earlier
        agreement to the other. Only warns when the file can't be written."""
        kept = []
        for known in self.known():
            if known.key != key:
                kept.append(known)
            elif known.tuning.flash_attention != tuning.flash_attention:
                kept.append(msgspec.structs.replace(known, agreed=known.agreed and not agreed))
            else:
                agreed = agreed or known.agreed
        content = _Content([*kept, Remembered(key, time(), tuning, agreed)])
        try:
            _write(self.path, msgspec.json.format(msgspec.json.encode(content), indent=2))
        except OSError as error:
            log.warning("what was measured can't be kept in %s: %s", self.path, error)


def _is_chosen(tuning: Tuning) -> bool:
    return tuning.flash_attention == tuning.prefers_flash_attention


def _write(path: Path, data: bytes) -> None:
    # Always the same name: whatever interrupts this, no more than one is left, and the next time takes it.
    scratch = path.with_name(f".{path.name}")
    flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW
    with os.fdopen(os.open(scratch, flags, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(path)
