"""Starts workers, one of them ahead where that saves time."""

from __future__ import annotations

import asyncio
import socket

from headstart.engine.worker_process import ended, started

# A process that loads no model until it is told to begin, and this side's end of its socket.
Launched = tuple[asyncio.subprocess.Process, socket.socket]


class Launcher:
    """Of workers for the model at `path`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._ahead: Launched | None = None

    async def prepare(self) -> None:
        """Starts the next one ahead, which imports meanwhile what it will need. Raises OSError."""
        self._ahead = self._ahead or await started(self.path)

    async def take(self) -> Launched:
        """Raises OSError."""
        ahead, self._ahead = self._ahead, None
        return ahead or await started(self.path)

    async def discard(self) -> None:
        """Ends one that was started ahead and not taken."""
        ahead, self._ahead = self._ahead, None
        if ahead:
            process, channel = ahead
            channel.close()
            await ended(process)
