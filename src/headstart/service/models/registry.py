"""The models of a server. Each is loaded at its first request, and unloaded when room is needed."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic

from headstart.caches.store import Store
from headstart.config.settings import Settings
from headstart.errors import ModelBusy, ModelLoading, ModelNotFound, OutOfMemory, StartupError
from headstart.model_files import models_in
from headstart.prompt.process.client import unfit
from headstart.service.background import BackgroundTasks
from headstart.service.interface.observer import Failure, Loaded, Observer
from headstart.service.models.model import Notify, ServedModel
from headstart.service.models.state_stores import StateStores
from headstart.service.models.tenant_model import TenantModel

log = logging.getLogger(__name__)

IDLE_CHECK_SECONDS = 1.0


class Models:
    """Used from the event loop. `on_loaded` is called once for each model, after its first load;
    `is_building` returns whether a cache of the model is being built. Raises StartupError if there is no
    model."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        say: Notify,
        on_loaded: Callable[[TenantModel], None],
        is_building: Callable[[str], bool],
        observer: Observer,
    ) -> None:
        self.settings = settings
        self.store = store
        self.say = say
        self.observer = observer
        self.all = {name: ServedModel(name, path, settings) for name, path in settings.model_paths.items()}
        self._on_loaded = on_loaded
        self._is_building = is_building
        self._reported: set[str] = set()
        self._users: Counter[str] = Counter()
        self._last_used: dict[str, float] = {}
        self._loads: dict[str, asyncio.Task[None]] = {}
        self.states = StateStores(settings, self.all)
        self._turns = self.states.turns
        # Room is made for one model at a time.
        self._making_room = asyncio.Lock()
        self._measuring = asyncio.Lock()
        self._tasks = BackgroundTasks()
        # Set whenever a request begins to use a model.
        self.used = asyncio.Event()
        if not self.all:
            raise StartupError(f"There is no model in {settings.models_dir}: no file named *.gguf.")
        # The server is ready only when these are loaded.
        self.first = self._first()
        self._starting = set(self.first)

    def rescan(self) -> None:
        """Reads the models folder again. Models configured by name stay."""
        if self.settings.models_dir is None:
            return
        found = models_in(self.settings.models_dir)
        gone = self.all.keys() - found.keys() - self.settings.models.keys()
        for name in gone:
            if not self.is_loaded(name) and not self.is_busy(name):
                del self.all[name]
        for name, path in found.items():
            if name not in self.all:
                self.all[name] = ServedModel(name, path, self.settings)

    def find(self, name: str) -> ServedModel | None:
        if name not in self.all:
            self.rescan()
        return self.all.get(name)

    def _first(self) -> list[str]:
        """Names of the models to load at the start, including those of declared caches."""
        names = list(self.all)
        preloaded = {"first": names[:1], "all": names, "none": []}[self.settings.preload]
        declared = [cache.model or names[0] for cache in self.settings.caches.values()]
        return [name for name in names if name in (*preloaded, *declared)]

    async def load_first(self) -> None:
        """Returns when the models to load at the start answer. Raises StartupError."""
        self._tasks.start(self._unload_idle())
        self.states.start()
        await asyncio.gather(*(self._load_at_start(self.all[name]) for name in self.first))

    async def _load_at_start(self, model: ServedModel) -> None:
        started = monotonic()
        async with self._turns[model.name]:
            await model.begin(self.store)
            await self.states.claim(model)
            await model.load(self.store, self.say, self._measuring)
        self._starting.discard(model.name)
        self._tell(model, monotonic() - started)

    async def close(self) -> None:
        await self._tasks.close()
        await self.states.close()
        await asyncio.gather(*(model.close() for model in self.all.values()))

    @asynccontextmanager
    async def use(self, model: TenantModel) -> AsyncIterator[TenantModel]:
        """The loaded model, for the same owner; it isn't unloaded within the context. Raises Unavailable, or
        ModelNotFound if its file has been removed."""
        name = model.name
        self._users[name] += 1
        self.used.set()
        try:
            if name not in self.all:
                raise ModelNotFound(f"There is no model {name!r} any more.", param="model")
            await self._be_ready(name)
            yield self.all[name].for_owner(model.owner)
        finally:
            self._users[name] -= 1
            self._last_used[name] = monotonic()

    async def _be_ready(self, name: str) -> None:
        engine = self.all[name].engine
        starting = name in self._starting or (name not in self._loads and engine.state == "loading")
        if starting or engine.state == "ready":
            # Requests don't wait for models that load at the start or restart after a crash.
            return
        if name not in self._loads:
            self._loads[name] = self._tasks.start(self._load(self.all[name]))
            self._loads[name].add_done_callback(lambda load: self._ended(name, load))
        load = self._loads[name]
        await asyncio.wait({load}, timeout=self.settings.load_timeout)
        if not load.done() or load.cancelled():
            raise ModelLoading(f"Model {name!r} is still loading.")
        load.result()

    def _ended(self, name: str, load: asyncio.Task[None]) -> None:
        del self._loads[name]
        if not load.cancelled() and (error := load.exception()):
            self.observer.failed(Failure("load", name, error))

    async def _load(self, model: ServedModel) -> None:
        """Raises Unavailable."""
        started = monotonic()
        async with self._turns[model.name]:
            try:
                # Outside `_making_room`: other models can load meanwhile, however long reading this file
                # takes.
                await model.begin(self.store)
            except StartupError as error:
                raise unfit(model.name, str(error)) from error
            try:
                await self.states.claim(model)
                async with self._making_room:
                    await self._keep_within(self.settings.max_loaded, model.name)
                    while not await self._fits(model):
                        pass
            except BaseException:
                await model.evict()
                self.states.release(model)
                raise
        self._tell(model, monotonic() - started)

    async def _keep_within(self, most: int, name: str) -> None:
        """Unloads models until one more may be loaded under the limit `most`. Raises OutOfMemory."""
        while most and len(self._loaded(but=name)) >= most:
            if not await self._unload_another(name):
                raise OutOfMemory(
                    f"Model {name!r} can't be loaded: at most {most} may be loaded, and all are in use."
                )

    async def _fits(self, model: ServedModel) -> bool:
        """Loads the model. Returns False if another model was unloaded for it instead: try again. Raises
        Unavailable."""
        try:
            # The only loaded model may take more memory than is available.
            within_memory = bool(self._loaded(but=model.name))
            await model.load(self.store, self.say, self._measuring, within_memory=within_memory)
        except OutOfMemory as error:
            await model.engine.close()
            if await self._unload_another(model.name):
                return False
            raise OutOfMemory(f"Model {model.name!r} can't be loaded: {error.message}.") from error
        except StartupError as error:
            raise unfit(model.name, str(error)) from error
        return True

    async def _unload_another(self, name: str) -> bool:
        """Unloads the least recently used idle model; returns whether there was one."""
        idle = [other for other in self._loaded(but=name) if not self.is_busy(other)]
        if idle:
            await self._stop(min(idle, key=lambda other: self._last_used.get(other, 0.0)))
        return bool(idle)

    async def unload(self, model: ServedModel, *, force: bool = False) -> bool:
        """Ends the model's worker; returns whether there was one. Raises ModelBusy if it is in use; with
        `force` its requests fail instead."""
        if self.is_busy(model.name) and not force:
            raise ModelBusy(f'Model {model.name!r} is in use; "force": true unloads it all the same.')
        was_loaded = self.is_loaded(model.name)
        await self._stop(model.name)
        return was_loaded

    async def reload(self, model: ServedModel) -> None:
        """Restarts the worker of an idle, loaded model with the current plan; other models are left alone.
        Requests that arrive meanwhile wait. Raises Unavailable."""
        if not self.is_busy(model.name) and self.is_loaded(model.name):
            await self._stop(model.name)
            async with self.use(model.for_owner("")):
                pass

    @property
    def is_idle(self) -> bool:
        return not any(map(self.is_busy, self.all))

    async def _stop(self, name: str) -> None:
        # The engine counts as closed before the first await: a request from then on loads it again.
        async with self._turns[name]:
            await self.all[name].close()
            self.states.release(self.all[name])
        log.info("model %s was unloaded", name)

    def is_busy(self, name: str) -> bool:
        waited_for = self._users[name] or name in self._loads or name in self._starting
        return bool(waited_for or self.all[name].engine.n_requests or self._is_building(name))

    def is_loaded(self, name: str) -> bool:
        return self.all[name].engine.state != "available"

    def _loaded(self, *, but: str = "") -> list[str]:
        return [name for name in self.all if name != but and self.is_loaded(name)]

    def _tell(self, model: ServedModel, seconds: float) -> None:
        self.observer.loaded(Loaded(model.name, seconds))
        self._last_used[model.name] = monotonic()
        if model.name not in self._reported:
            self._reported.add(model.name)
            self._on_loaded(model.for_owner(""))

    async def _unload_idle(self) -> None:
        while seconds := self.settings.idle_unload_seconds:
            await asyncio.sleep(min(IDLE_CHECK_SECONDS, seconds))
            try:
                await self._unload_unused(seconds)
            except Exception:
                # The next check must happen all the same.
                log.exception("idle models can't be unloaded")

    async def _unload_unused(self, seconds: float) -> None:
        for name in self._loaded():
            last = self._last_used.get(name, monotonic())
            if monotonic() - last >= seconds and not self.is_busy(name):
                await self._stop(name)

    @property
    def ready(self) -> bool:
        """Whether the models loaded at the start answer, or were unloaded since and would be loaded again."""
        states = [self.all[name].engine.state for name in self.first if name not in self._loads]
        return not self._starting and all(state in ("ready", "available") for state in states)
