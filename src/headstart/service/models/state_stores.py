"""The state stores of all models, seen from the server: the limits of each. A loaded model's store belongs to
its worker."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from headstart.config.settings import Settings
from headstart.engine.kinds import engine_kind
from headstart.names import Namespace
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

# The part of its limit from which on a store is given more.
NEARLY_FULL = 0.75
# The least that a loaded model's store asks for: this part of all that there is.
LEAST_WANTED = 1 / 8


class StateStores:
    """Used from the event loop. The limits of all stores together never pass those of the settings."""

    def __init__(self, settings: Settings, models: Mapping[str, ServedModel]) -> None:
        self.settings = settings
        self.models = models
        self.limits = StateLimits(memory_limit(settings).n_bytes, disk_limit(settings).n_bytes)
        # Models whose workers have stores, or will have them.
        self._loaded: set[str] = set()
        # Bytes on the disk by model, as last seen.
        self._on_disk: dict[str, int] = {}
        self._sharing = asyncio.Lock()
        self._tasks = BackgroundTasks()

    async def close(self) -> None:
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
        self._tasks.start(self._share())

    async def settled(self) -> None:
        """Returns when the limits have been divided for all that has happened."""
        await self._tasks.join()

    async def _share(self) -> None:
        async with self._sharing:
            self._on_disk = await asyncio.to_thread(held, self.settings.cache_dir)
            divided = self._divided()
            # Whoever has to give something up does so before others get it.
            for model in sorted(self._with_stores(), key=lambda model: _gain(model, divided[model.name])):
                self._set(model, divided[model.name])

    def _with_stores(self) -> list[ServedModel]:
        there = (model for name, model in self.models.items() if name in self._loaded)
        return [model for model in there if _keeps_states(model)]

    def _divided(self) -> dict[str, StateLimits]:
        """The present share of each model."""
        loaded = [model.name for model in self._with_stores()]
        memory = dict.fromkeys(loaded, int(self.limits.memory * LEAST_WANTED))
        disk = dict(self._on_disk)
        for name in loaded:
            store = self.models[name].engine.store
            memory[name] = max(memory[name], 2 * store.memory_bytes)
            least = int(self.limits.disk * LEAST_WANTED)
            disk[name] = max(least, 2 * store.disk_bytes, self._on_disk.get(name, 0))
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


def _keeps_states(model: ServedModel) -> bool:
    """False for a model whose engine has no store, or that only makes embeddings."""
    info = model.engine.info
    return not engine_kind(model.path).on_npu and (info is None or info.generates)


def _limits(model: ServedModel) -> StateLimits:
    return StateLimits(model.states.memory_bytes, model.states.disk_bytes)


def _gain(model: ServedModel, limits: StateLimits) -> int:
    now = _limits(model)
    return limits.memory - now.memory + limits.disk - now.disk
