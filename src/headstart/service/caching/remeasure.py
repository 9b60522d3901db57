"""Repeats measurements, while the server is idle, that were made while the machine did other work."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

from headstart.caches.entry import Entry
from headstart.caches.store import Store
from headstart.engine.model import ModelError
from headstart.engine.tuning.resolve import measure_apart
from headstart.engine.worker_process import worker_environment
from headstart.errors import HeadstartError
from headstart.numerics import Numerics, Tuning
from headstart.protocol import EngineSettings
from headstart.service.background import BackgroundTasks
from headstart.service.caching.caching import Caching
from headstart.service.models.cache_fit import doubted, measured_again
from headstart.service.models.model import Notify, ServedModel
from headstart.service.models.plan import Plan
from headstart.service.models.registry import Models
from headstart.service.models.tuning_store import Tunings

log = logging.getLogger(__name__)

# Factor by which the wait grows with each try; the first wait is `idle_seconds`.
BACK_OFF = 6
MOST_BACK_OFF = BACK_OFF**3
LOOK_SECONDS = 0.25

Measure = Callable[[EngineSettings, socket.socket, dict[str, str]], Tuning]


class Remeasuring:
    """Used from the event loop. Measuring stops as soon as a request arrives. `idle_seconds`: how long the
    server must have been idle before; 0 turns it off."""

    def __init__(
        self,
        store: Store,
        models: Models,
        caching: Caching,
        say: Notify,
        idle_seconds: float,
        measure: Measure = measure_apart,
    ) -> None:
        self.store = store
        self.models = models
        self.caching = caching
        self.say = say
        self.idle_seconds = idle_seconds
        self.measure = measure
        self._tunings = Tunings(store.directory)
        self._attempts: Counter[str] = Counter()
        self._not_before: dict[str, float] = {}
        # Models whose caches were checked since the start.
        self._fitted: set[str] = set()
        self._tasks = BackgroundTasks()

    def start(self) -> None:
        if self.idle_seconds:
            self._tasks.start(self._run())

    async def close(self) -> None:
        await self._tasks.close()

    async def _run(self) -> None:
        idle_since = monotonic()
        while True:
            await asyncio.sleep(min(LOOK_SECONDS, self.idle_seconds))
            if self.models.used.is_set() or not self.models.is_idle:
                self.models.used.clear()
                idle_since = monotonic()
            elif monotonic() - idle_since >= self.idle_seconds:
                for model in self._ready():
                    await self._look_at(model)

    def _ready(self) -> list[ServedModel]:
        return [model for model in self.models.all.values() if model.engine.state == "ready"]

    async def _look_at(self, model: ServedModel) -> None:
        """Errors are logged, so that the other models are still measured."""
        try:
            plan = model.plan(self.store)
            if plan.again and monotonic() >= self._not_before.get(model.name, 0.0):
                await self._try_again(model, plan, plan.again)
            elif model.name not in self._fitted and plan.overrides:
                await self._fit(model)
        except Exception:
            self._wait_longer(model.name)
            log.exception("%s could not be measured again", model.name)

    def _wait_longer(self, name: str) -> None:
        seconds = self.idle_seconds * min(BACK_OFF ** self._attempts[name], MOST_BACK_OFF)
        self._attempts[name] += 1
        self._not_before[name] = monotonic() + seconds

    async def _try_again(self, model: ServedModel, plan: Plan, settings: EngineSettings) -> None:
        log.info("measuring %s again", model.name)
        self._wait_longer(model.name)
        tuning = await self._measured(settings)
        if tuning is None:
            return
        changes = settings.existing.is_whole and tuning.counts and tuning.numerics != settings.existing
        self._tunings.put(plan.key, tuning, overrides=changes)
        if not tuning.counts:
            log.warning(doubted(model.name, tuning))
            return
        self._fitted.discard(model.name)
        n_caches = len(self._unfit(model, tuning.numerics)) if changes else 0
        self.say(measured_again(model.name, tuning, n_caches))
        try:
            await self.models.reload(model)
        except HeadstartError as error:
            log.warning("%s can't be run with the measured settings: %s", model.name, error.message)
            self._tunings.forget(plan.key)

    async def _measured(self, settings: EngineSettings) -> Tuning | None:
        """Returns None if measuring failed or was interrupted."""
        ours, theirs = socket.socketpair()
        self.models.used.clear()
        used = asyncio.create_task(self.models.used.wait())
        work = asyncio.create_task(asyncio.to_thread(self.measure, settings, theirs, worker_environment()))
        try:
            while not (work.done() or used.done()) and self.models.is_idle:
                await asyncio.wait([work, used], timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Ends the measuring process if it is still running.
            ours.close()
            used.cancel()
            await asyncio.wait([work])
            theirs.close()
        try:
            return work.result()
        except EOFError:
            return None
        except ModelError as error:
            log.warning("repeated measurement failed: %s", error)
            return None

    async def _fit(self, model: ServedModel) -> None:
        """Rebuilds caches with numerics other than their model's, one at a time, while the server is idle. A
        cache that can't be rebuilt now is rebuilt at its next use."""
        self._fitted.add(model.name)
        for entry in self._unfit(model, Numerics.of(model.info.settings)):
            while not self.models.is_idle:
                await asyncio.sleep(LOOK_SECONDS)
            with suppress(HeadstartError):
                async with self.models.use(model.for_owner(entry.owner)) as used:
                    await self.caching.rebuilt(used, entry)

    def _unfit(self, model: ServedModel, numerics: Numerics) -> list[Entry]:
        """Caches with states that are worth rebuilding; those of responses aren't."""
        return [
            entry
            for entry in model.entries(self.store)
            if entry.forms
            and entry.origin != "response"
            and Numerics.of(entry.fingerprint.settings) != numerics
        ]
