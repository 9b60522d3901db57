"""Starts workers, optionally one ahead of time."""

from __future__ import annotations

import asyncio
import socket

from headstart.engine.worker_process import ended, started

# A process that loads no model until it receives Begin, and the server's end of its socket.
Launched = tuple[asyncio.subprocess.Process, socket.socket]


class Launcher:
    """Starts workers for the model at `path`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._ahead: Launched | None = None

    async def prepare(self) -> None:
        """Starts the next worker ahead, so that it imports its libraries meanwhile. Raises OSError."""
        self._ahead = self._ahead or await started(self.path)

    async def take(self) -> Launched:
        """The worker started ahead, else a new one. Raises OSError."""
        ahead, self._ahead = self._ahead, None
        return ahead or await started(self.path)

    async def discard(self) -> None:
        """Ends a worker that was started ahead and not taken."""
        ahead, self._ahead = self._ahead, None
        if ahead:
            process, channel = ahead
            channel.close()
            await ended(process)
