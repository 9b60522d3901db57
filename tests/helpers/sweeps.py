"""Long sweeps: `make test` tries every 16th case, `make sweep` all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

ALL = os.environ.get("HEADSTART_SWEEP") == "all"
STRIDE = 1 if ALL else 16


def swept(cases: Iterable[T]) -> list[T]:
    """All cases in `make sweep`, else every 16th, the first included. Mark the test with `sweep`."""
    return list(islice(cases, 0, None, STRIDE))


def rounds(n: int) -> int:
    """`n` in `make sweep`, else a sixteenth of it, at least 1: for repeated kills and random examples."""
    return max(n // STRIDE, 1)
