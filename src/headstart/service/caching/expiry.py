"""Periodic clean-up of expired caches, and eviction under a lowered quota."""

from __future__ import annotations

import asyncio
import logging

from headstart.caches.store import Store
from headstart.errors import HeadstartError
from headstart.service.background import BackgroundTasks
from headstart.service.caching.forget import StateRemoval
from headstart.service.caching.quota import Quota

log = logging.getLogger(__name__)

SWEEP_SECONDS = 10.0


class ExpirySweep:
    """Sweeps periodically, from `start` to `close`. An expired cache is refused at once, even before its file
    is deleted. The interval between sweeps doesn't depend on the wall clock."""

    def __init__(self, store: Store, quota: Quota, removal: StateRemoval) -> None:
        self.store = store
        self.quota = quota
        self.removal = removal
        self._tasks = BackgroundTasks()

    def start(self) -> None:
        self._tasks.start(self._sweep_on())

    async def close(self) -> None:
        await self._tasks.close()

    async def _sweep_on(self) -> None:
        while True:
            try:
                await self.sweep()
            except HeadstartError as error:
                log.warning("removing expired and surplus caches failed: %s", error.message)
            await asyncio.sleep(SWEEP_SECONDS)

    async def sweep(self) -> None:
        """Raises StorageError or EngineDied."""
        self.store.index.save()
        self.store.remove_expired()
        await self.quota.trim()
        await self.removal.catch_up()
