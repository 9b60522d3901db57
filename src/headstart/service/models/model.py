"""A served model: its prompts, its engine, and its fingerprint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from time import time

import msgspec

from headstart.caches.entry import Entry, Fingerprint
from headstart.caches.store import Store
from headstart.config.settings import Settings
from headstart.engine.client import EngineClient, EngineState
from headstart.engine.kinds import engine_kind
from headstart.errors import ModelLoading, StartupError
from headstart.prompt.process.client import PromptClient, facts_of
from headstart.prompt.process.protocol import Facts, Load
from headstart.prompt.vocabulary import Vocabulary
from headstart.protocol import ModelInfo, StateSettings
from headstart.regular_files import read_text
from headstart.service.models.cache_fit import doubted, kept_back, misfits, warnings
from headstart.service.models.plan import Plan, engine_settings, make_plan
from headstart.service.models.tenant_model import TenantModel
from headstart.service.models.tuning_store import Tunings

Notify = Callable[[str], None]


class ServedModel:
    """A model's two processes, the engine and the prompt process, and what is known of its file."""

    def __init__(self, name: str, path: str, settings: Settings) -> None:
        self.name = name
        self.settings = settings
        self.path = model_path(path)
        self.created = int(time())
        self.engine = EngineClient(name, engine_settings(self.path, settings), settings.max_waiting)
        # The settings of the worker's state store from its start on.
        self.states = StateSettings()
        self.prompt_process = PromptClient(name, settings.prompt_timeout)
        self._weights = ""
        self._begins = False

    async def begin(self, store: Store) -> None:
        """Reads the model's file in the prompt process before anything else does, because reading may hang,
        crash or exhaust memory. Raises StartupError."""
        await self.close()
        self._begins = True
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.engine.launcher.prepare())
                tasks.create_task(self.prompt_process.start(self._to_load()))
                weights = tasks.create_task(_weights_hash(self.path, store))
            self._weights = weights.result()
        except ExceptionGroup as group:
            await self.close()
            error = group.exceptions[0]
            self.engine.fail(str(error))
            raise StartupError(str(error)) if isinstance(error, OSError) else error from group
        finally:
            self._begins = False

    def _to_load(self) -> Load:
        return Load(self.path, template_of(self.name, self.settings))

    async def close(self) -> None:
        """Ends both processes; the model can be loaded again. The engine counts as closed at once."""
        try:
            await self.engine.close()
        finally:
            await self.prompt_process.close()

    async def evict(self) -> None:
        """Undoes `begin` if loading is not continued; the error of a failed engine stays known."""
        if self.engine.state == "failed":
            await asyncio.gather(self.engine.launcher.discard(), self.prompt_process.close())
        else:
            await self.close()

    @property
    def state(self) -> EngineState:
        return "loading" if self._begins else self.engine.state

    async def load(
        self, store: Store, say: Notify, measuring: asyncio.Lock, *, within_memory: bool = False
    ) -> None:
        """Call after `begin`. Returns when the model answers requests. Raises StartupError, or OutOfMemory
        with `within_memory` if the model needs more memory than is available. One model is measured at a
        time; slow steps, now or later, are reported by `say`."""
        tunings = Tunings(store.directory)
        plan = self.plan(store)
        states = msgspec.structs.replace(self.states, weights=self._weights)
        self.engine.settings = msgspec.structs.replace(
            plan.settings, within_memory=within_memory, states=states
        )
        async with measuring if plan.measures else nullcontext():
            if plan.measures and engine_kind(self.path).is_timed:
                say(f"Measuring the fastest settings for {self.name} (once per model and machine) ...")
            self.engine.start()
            await self.engine.wait_ready()
        tuning = self.engine.settings.tuning
        if plan.measures and tuning:
            tunings.put(plan.key, tuning)
            preferred = plan.kept_back(tuning)
            if preferred and tuning.counts:
                say(kept_back(self.name, tuning.numerics, preferred))
        suspect = tuning if plan.measures and tuning and not tuning.counts else plan.doubted
        if suspect:
            say(doubted(self.name, suspect))
        for warning in warnings(self.name, misfits(self.entries(store), self.fingerprint)):
            say(warning)

    def plan(self, store: Store) -> Plan:
        """The current plan of how to run the model; its weights must have been hashed."""
        tunings = Tunings(store.directory)
        return make_plan(self.path, self._weights, self.settings, tunings, self.entries(store))

    def for_owner(self, owner: str) -> TenantModel:
        """The model for requests of `owner`; "": for the public."""
        return TenantModel(self, owner)

    def entries(self, store: Store) -> list[Entry]:
        """Its caches, of all owners."""
        return [entry for entry in store.entries() if entry.model == self.name]

    @property
    def vocabulary(self) -> Vocabulary:
        """Raises ModelLoading until the prompt process knows it."""
        return self.prompt_process.vocabulary

    @property
    def info(self) -> ModelInfo:
        """Raises ModelLoading until the engine has been ready once."""
        if self.engine.info is None or not self._weights:
            raise ModelLoading(f"Model {self.name!r} is still loading.")
        return self.engine.info

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self._weights, self.info.engine, self.info.settings, self.vocabulary.template_hash)


def template_of(name: str, settings: Settings) -> str | None:
    """The source of the chat template configured for the model, if any. Raises StartupError."""
    template = settings.templates.get(name)
    if template is None:
        return None
    try:
        return read_text(template, follow=True)
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"The chat template {template} can't be read: {error}") from error


async def facts(path: str, settings: Settings, name: str) -> Facts:
    """Properties of the model file, read without loading the model. Raises StartupError."""
    return await facts_of(path, template_of(name, settings))


def model_path(path: str) -> str:
    return engine_kind(path).location(path)


async def _weights_hash(path: str, store: Store) -> str:
    if (substitute := engine_kind(path).weights_id(path)) is not None:
        return substitute
    return await store.weights_hash(Path(path))
