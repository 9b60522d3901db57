"""The state stores of all models, as the server manages them. A loaded model's store belongs to its worker,
which is asked; in the directory of another one the server itself works."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, time

from msgspec.structs import replace

from headstart.caches.files import storage_errors
from headstart.config.settings import Settings
from headstart.engine.kinds import engine_kind
from headstart.engine.states import directory
from headstart.engine.states.directory import DirectoryUsage
from headstart.errors import EngineDied, ModelLoading
from headstart.names import Namespace
from headstart.protocol import Source, StoreReport
from headstart.service.background import BackgroundTasks
from headstart.service.models.model import ServedModel
from headstart.service.models.state_limits import (
    StateLimits,
    disk_limit,
    held,
    memory_limit,
    shares,
    states_directory,
    with_rest,
)

log = logging.getLogger(__name__)

# The part of its limit from which on a store is given more.
NEARLY_FULL = 0.75
# The least that a loaded model's store asks for: this part of all that there is.
LEAST_WANTED = 1 / 8
EXPIRY_SECONDS = 3600.0
DAY_SECONDS = 86400.0
# Follows a model's name: what its directory holds of states that its worker can't use.
UNUSABLE = "/"
RESTART_SECONDS = 60.0
LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class StoreState:
    """The content and limits of stores, and the requests that started from a state, by its source."""

    report: StoreReport
    limits: StateLimits
    hits: Counter[Source]


class StateStores:
    """Used from the event loop. The limits of all stores together never pass those of the settings. `turns`:
    a model is loaded or unloaded, or its directory is worked in, never two of these at once."""

    def __init__(self, settings: Settings, models: Mapping[str, ServedModel]) -> None:
        self.settings = settings
        self.models = models
        self.limits = StateLimits(memory_limit(settings).n_bytes, disk_limit(settings).n_bytes)
        self.turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        # Models whose workers have stores, or will have them.
        self._loaded: set[str] = set()
        # Bytes on the disk by model, as last seen.
        self._on_disk: dict[str, int] = {}
        # Of models that aren't loaded, as last counted.
        self._usage: dict[str, DirectoryUsage] = {}
        self._sharing = asyncio.Lock()
        self._tasks = BackgroundTasks()
        self._expiry = BackgroundTasks()

    def start(self) -> None:
        """Deletes from now on what wasn't used for `state_days`; workers do so themselves."""
        if self.settings.state_days:
            self._expiry.start(self._expire_on())

    async def close(self) -> None:
        await self._expiry.close()
        await self._tasks.close()

    def directory(self, model: str) -> Path:
        return states_directory(self.settings.cache_dir) / Namespace.of(model)

    async def claim(self, model: ServedModel) -> None:
        """Gives a model that is to be loaded its share; call it before its worker begins."""
        self._loaded.add(model.name)
        await self._share()

    def release(self, model: ServedModel) -> None:
        """The model's worker has ended."""
        self._loaded.discard(model.name)
        self._usage.pop(model.name, None)
        self._tasks.start(self._share())

    async def settled(self) -> None:
        """Returns when the limits have been divided for all that has happened."""
        await self._tasks.join()

    async def _share(self) -> None:
        async with self._sharing:
            self._on_disk = await asyncio.to_thread(held, self.settings.cache_dir)
            divided = self._divided()
            for name, n_bytes in self._unused().items():
                if divided[name].disk < n_bytes:
                    await self._shrink(name.removesuffix(UNUSABLE), divided[name].disk)
            # Whoever has to give something up does so before others get it.
            for model in sorted(self._with_stores(), key=lambda model: _gain(model, divided[model.name])):
                self._set(model, divided[model.name])

    async def _shrink(self, model: str, n_bytes: int) -> None:
        turn = self.turns[model]
        if turn.locked():
            # It is being loaded or unloaded: the limits are divided again then.
            return
        async with turn:
            self._usage.pop(model, None)
            try:
                await asyncio.to_thread(directory.shrink, self.directory(model), n_bytes)
            except OSError as error:
                log.warning("the stored states of %s can't be reduced: %s", model, error)

    def _with_stores(self) -> list[ServedModel]:
        there = (model for name, model in self.models.items() if name in self._loaded)
        return [model for model in there if _keeps_states(model)]

    def _unused(self) -> dict[str, int]:
        """Bytes on the disk that no worker can use: of models that aren't loaded, and of other engines or
        settings than a model's present ones."""
        loaded = {model.name: model.engine for model in self._with_stores()}
        found = {name: n_bytes for name, n_bytes in self._on_disk.items() if name not in loaded}
        for name, engine in loaded.items():
            # Until its store reports, all may be its own.
            other = self._on_disk.get(name, 0) - engine.store.disk_bytes
            if engine.has_reported and other > 0:
                found[name + UNUSABLE] = other
        return found

    def _divided(self) -> dict[str, StateLimits]:
        """The present share of each model."""
        loaded = {model.name: model.engine for model in self._with_stores()}
        memory, disk = {}, self._unused()
        for name, engine in loaded.items():
            own = engine.store.disk_bytes if engine.has_reported else self._on_disk.get(name, 0)
            memory[name] = max(int(self.limits.memory * LEAST_WANTED), 2 * engine.store.memory_bytes)
            disk[name] = max(int(self.limits.disk * LEAST_WANTED), 2 * own)
        memory = with_rest(self.limits.memory, shares(self.limits.memory, memory), loaded)
        disk = with_rest(self.limits.disk, shares(self.limits.disk, disk), loaded)
        return {name: StateLimits(memory.get(name, 0), disk[name]) for name in disk}

    def _set(self, model: ServedModel, limits: StateLimits) -> None:
        model.states = replace(
            model.states,
            directory=str(self.directory(model.name)),
            memory_bytes=limits.memory,
            disk_bytes=limits.disk,
            days=self.settings.state_days,
        )
        model.engine.set_state_limits(limits.memory, limits.disk)
        model.engine.on_store = lambda: self._reported(model)

    def _reported(self, model: ServedModel) -> None:
        """A store that is nearly full gets more if others leave it."""
        store, limits = model.engine.store, _limits(model)
        full = (
            store.memory_bytes > NEARLY_FULL * limits.memory or store.disk_bytes > NEARLY_FULL * limits.disk
        )
        if full and not self._sharing.locked() and model.name in (divided := self._divided()):
            now = divided[model.name]
            if now.memory > limits.memory or now.disk > limits.disk:
                self._tasks.start(self._share())

    async def state(self, model: str | None, hits: Counter[Source]) -> StoreState:
        """The content of one model's store or of all, with the limits of those that can grow. Raises
        StorageError."""
        names = self.names() if model is None else [model]
        reports = [await self._report(name) for name in names]
        served = [self.models[name].states for name in names if name in self._loaded]
        limits = StateLimits(
            sum(each.memory_bytes for each in served), sum(each.disk_bytes for each in served)
        )
        return StoreState(_sum(reports), self.limits if model is None else limits, hits)

    async def _report(self, model: str) -> StoreReport:
        served = self.models.get(model)
        report = served.engine.store if served else StoreReport()
        if model in self._loaded:
            return report
        if (counted := self._usage.get(model)) is None:
            with storage_errors(str(self.directory(model))):
                counted = await asyncio.to_thread(directory.usage, self.directory(model))
            self._usage[model] = counted
        return replace(report, disk_bytes=counted.n_bytes, disk_tokens=counted.tokens, chains=counted.chains)

    def reports(self) -> dict[str, StoreReport]:
        """The last report of each model's store; of models that aren't loaded the counts and the bytes on
        disk, as last seen."""
        reports = {name: model.engine.store for name, model in self.models.items()}
        on_disk = {name: n_bytes for name, n_bytes in self._on_disk.items() if name not in self._loaded}
        empty = StoreReport()
        return reports | {
            name: replace(reports.get(name, empty), disk_bytes=n_bytes) for name, n_bytes in on_disk.items()
        }

    def names(self) -> list[str]:
        """The models with a store, also those that the settings no longer have."""
        return sorted({*self.models, *self._on_disk})

    async def clear(self, owner: str | None, model: str | None = None) -> None:
        """Empties the store of one model or of all: of what this owner's requests computed, or of everything.
        Raises as `forget`."""
        for name in self.names() if model is None else [model]:
            await self.forget(name, owner)

    async def forget(
        self,
        model: str,
        owner: str | None,
        tokens: list[int] | None = None,
        kept: Sequence[list[int]] = (),
    ) -> None:
        """Removes states as Forget says, wherever they are. Raises EngineDied if the model's worker neither
        answers nor ends, or StorageError."""
        engine = self.models[model].engine if model in self.models else None
        deadline = monotonic() + RESTART_SECONDS
        while True:
            async with self.turns[model]:
                if engine is None or engine.state in ("available", "failed"):
                    await self._forget_on_disk(model, owner, tokens, kept)
                    return
            try:
                await engine.forget(owner, tokens, kept)
                break
            except (EngineDied, ModelLoading):
                # Another worker finds what is on the disk, and is asked again.
                if monotonic() > deadline:
                    raise
                await asyncio.sleep(LOOK_SECONDS)
        async with self.turns[model]:
            await self._forget_on_disk(model, owner, tokens, kept)

    async def _forget_on_disk(
        self, model: str, owner: str | None, tokens: list[int] | None, kept: Sequence[list[int]]
    ) -> None:
        """Leaves alone what a worker owns."""
        self._usage.pop(model, None)
        with storage_errors(str(self.directory(model))):
            await asyncio.to_thread(directory.forget, self.directory(model), owner, tokens, kept)

    async def _expire_on(self) -> None:
        while True:
            self._on_disk = await asyncio.to_thread(held, self.settings.cache_dir)
            for name in self._on_disk:
                try:
                    await self._expire(name)
                except OSError as error:
                    log.warning("expired states of %s can't be deleted: %s", name, error)
            await asyncio.sleep(EXPIRY_SECONDS)

    async def _expire(self, model: str) -> None:
        """Raises OSError."""
        before = time() - self.settings.state_days * DAY_SECONDS
        async with self.turns[model]:
            self._usage.pop(model, None)
            await asyncio.to_thread(directory.expire, self.directory(model), before)


def _sum(reports: Sequence[StoreReport]) -> StoreReport:
    return StoreReport(
        *(sum(getattr(report, name) for report in reports) for name in StoreReport.__struct_fields__)
    )


def _keeps_states(model: ServedModel) -> bool:
    """False for a model whose engine has no store, or that only makes embeddings."""
    info = model.engine.info
    return not engine_kind(model.path).on_npu and (info is None or info.generates)


def _limits(model: ServedModel) -> StateLimits:
    return StateLimits(model.states.memory_bytes, model.states.disk_bytes)


def _gain(model: ServedModel, limits: StateLimits) -> int:
    now = _limits(model)
    return limits.memory - now.memory + limits.disk - now.disk
