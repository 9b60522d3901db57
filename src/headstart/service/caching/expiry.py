"""What happens to caches by time alone: their end, and a limit that became lower."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from headstart.caches.store import Store
from headstart.errors import StorageError
from headstart.service.caching.quota import Quota

log = logging.getLogger(__name__)

SWEEP_SECONDS = 10.0


class Lifecycle:
    """Sweeps now and then, from `start` to `close`. A cache whose time is over is refused at once, whenever
    its file goes; how long it is to the next sweep doesn't depend on the wall clock."""

    def __init__(self, store: Store, quota: Quota) -> None:
        self.store = store
        self.quota = quota
        self._sweeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._sweeping = asyncio.create_task(self._sweep_on())

    async def close(self) -> None:
        if self._sweeping:
            self._sweeping.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeping

    async def _sweep_on(self) -> None:
        while True:
            try:
                await self.sweep()
            except StorageError as error:
                log.warning("caches can't be swept: %s", error.message)
            await asyncio.sleep(SWEEP_SECONDS)

    async def sweep(self) -> None:
        """Raises StorageError."""
        self.store.index.save()
        self.store.end_old()
        await self.quota.trim()
