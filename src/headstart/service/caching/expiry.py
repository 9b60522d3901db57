"""Periodic clean-up of expired caches, and eviction under a lowered quota."""

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
    """Sweeps periodically, from `start` to `close`. An expired cache is refused at once, even before its file
    is deleted. The interval between sweeps doesn't depend on the wall clock."""

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
                log.warning("removing expired and surplus caches failed: %s", error.message)
            await asyncio.sleep(SWEEP_SECONDS)

    async def sweep(self) -> None:
        """Raises StorageError."""
        self.store.index.save()
        self.store.end_old()
        await self.quota.trim()
