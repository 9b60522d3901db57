"""A running server. Its API uses it through five doors: `models`, `caches`, `generation`, `responses` and
`close`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from headstart.caches.store import Store
from headstart.config.settings import Settings
from headstart.errors import ModelNotFound
from headstart.service.caching.caching import Caching
from headstart.service.caching.expiry import ExpirySweep
from headstart.service.caching.facade import Caches
from headstart.service.caching.forget import StateRemoval
from headstart.service.caching.quota import Quota
from headstart.service.caching.remeasure import Remeasuring
from headstart.service.caching.verify import Verifier
from headstart.service.generation.generate import Generation
from headstart.service.generation.grammars import GrammarChecks
from headstart.service.generation.planner import PromptPlanner
from headstart.service.generation.prepare import Preparation
from headstart.service.interface.observer import Observer, Observers
from headstart.service.log_observer import LogObserver
from headstart.service.models.model import Notify
from headstart.service.models.model_names import split
from headstart.service.models.registry import Models
from headstart.service.models.reuse import ReuseCounter
from headstart.service.models.tenant_model import TenantModel
from headstart.service.origins.automatic import Automatic
from headstart.service.origins.breakpoints import Breakpoints
from headstart.service.origins.conversations import Conversations
from headstart.service.origins.declared import Declared
from headstart.service.origins.responses import Responses

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """The model that a request names, and the caches that it is to start from; None: none are named.
    `is_default`: they are its route's or key's, not named by the request itself."""

    model: TenantModel
    caches: tuple[str, ...] | None = None
    is_default: bool = False


class Service:
    """Created, loaded and closed by the code that runs the server. `say` reports slow steps to the user;
    `observers` receive the server's events besides its log. Until a model is loaded, requests for it raise
    ModelLoading."""

    def __init__(
        self, settings: Settings, say: Notify = log.info, observers: Sequence[Observer] = ()
    ) -> None:
        self.settings = settings
        reuse = ReuseCounter()
        observer = Observers([LogObserver(), reuse, *observers])
        store = Store(settings.cache_dir)
        quota = Quota(store, int(settings.quota_mb * 1e6), settings.quotas, observer)
        caching = Caching(quota)
        declared = Declared(settings, caching, say)
        self.models = Models(
            settings,
            store,
            say,
            on_loaded=declared.start,
            is_building=caching.builds.is_building_for,
            observer=observer,
        )
        verifier = Verifier(caching, self.models.all)
        removal = StateRemoval(store, self.models.states, self.models.all)
        self.caches = Caches(store, caching, quota, verifier, removal, reuse)
        automatic = Automatic(settings, caching)
        conversations = Conversations(caching)
        breakpoints = Breakpoints(caching, automatic)
        self.responses = Responses(settings, conversations, automatic, quota, removal)
        grammars = GrammarChecks(settings.max_waiting)
        planner = PromptPlanner(caching, automatic, conversations, breakpoints)
        preparation = Preparation(planner, conversations, grammars)
        kept = (caching, automatic, conversations, self.responses, breakpoints)
        self.generation = Generation(preparation, *kept, observer)
        self._expiry = ExpirySweep(store, quota, removal)
        idle_seconds = settings.tune_idle_seconds if settings.tune else 0
        self._remeasuring = Remeasuring(store, self.models, caching, say, idle_seconds)
        self._store = store
        # In the order in which they are closed: what starts builds, then builds, then what these need.
        self._parts = (
            self._remeasuring,
            self._expiry,
            declared,
            breakpoints,
            automatic,
            conversations,
            self.responses,
            caching,
            grammars,
            self.models,
        )

    async def load(self) -> None:
        """Returns when every model loaded at the start answers. Raises StartupError."""
        self._expiry.start()
        await self.models.load_first()
        self._remeasuring.start()

    async def close(self) -> None:
        for part in self._parts:
            await part.close()
        self._store.close()

    def resolve(self, name: str, owner: str = "") -> Target:
        """The model of this name for requests of `owner`, and the cache if the name is `model@cache` or an
        alias of one. Raises ModelNotFound."""
        model_name, cache = split(name, self.settings.aliases)
        if (model := self.models.find(model_name)) is None:
            raise ModelNotFound(
                f"There is no model {name!r}. This server has: {', '.join(self.names())}.", param="model"
            )
        return Target(model.for_owner(owner), None if cache is None else (cache,))

    def model(self, name: str, owner: str = "") -> TenantModel:
        """The model of this name or alias. Raises ModelNotFound, also for a name with a cache
        (`model@cache`)."""
        if "@" in name:
            raise ModelNotFound(f"{name!r} also names a cache; send the model's name alone.", param="model")
        return self.resolve(name, owner).model

    def names(self) -> list[str]:
        """Models and aliases."""
        return [*self.models.all, *self.settings.aliases]
