"""Workers of a service that runs in the tests' own process."""

from __future__ import annotations

from contextlib import suppress

import psutil


def own_workers() -> list[psutil.Process]:
    """Without those of servers that other tests have left running, which are children of their servers."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "headstart.engine.worker" in child.cmdline():
                found.append(child)
    return found
