"""Mounts file systems, where the tests may."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def mounted(*options: str) -> Iterator[None]:
    """A mount for as long as the block runs. Where it isn't possible, the test is skipped and says why; that
    this is so is left for the second test of each kind to make good, which needs no mount."""
    where = options[-1]
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if os.environ.get("CI") and os.geteuid() == 0 and "permission denied" not in done.stderr.lower():
            pytest.fail(f"mounting failed though root does it: {done.stderr}")
        pytest.skip(f"mounting isn't possible here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)
