"""The facade of a running server: its models, its caches and the generation of answers."""

from __future__ import annotations

import logging

from headstart.caches.store import Store
from headstart.config.settings import Settings
from headstart.errors import ModelNotFound
from headstart.service.caching.caching import Caching
from headstart.service.caching.expiry import Lifecycle
from headstart.service.caching.quota import Quota
from headstart.service.caching.remeasure import Remeasuring
from headstart.service.caching.transfer import Files
from headstart.service.caching.verify import Verifier
from headstart.service.generation.generate import Generation
from headstart.service.generation.grammars import Grammars
from headstart.service.generation.prepare import Preparation
from headstart.service.models.model import Notify, ServedModel
from headstart.service.models.model_names import split
from headstart.service.models.registry import Models
from headstart.service.origins.automatic import Automatic
from headstart.service.origins.breakpoints import Breakpoints
from headstart.service.origins.conversations import Conversations
from headstart.service.origins.declared import Declared
from headstart.service.origins.responses import Responses

log = logging.getLogger(__name__)


class Service:
    """Created, loaded and closed by the code that runs the server. `say` reports slow steps to the user.
    Until a model is loaded, requests for it raise ModelLoading."""

    def __init__(self, settings: Settings, say: Notify = log.info) -> None:
        self.say = say
        self.settings = settings
        self.store = Store(settings.cache_dir)
        self.quota = Quota(self.store, int(settings.quota_mb * 1e6), settings.quotas)
        self.lifecycle = Lifecycle(self.store, self.quota)
        self.caching = Caching(self.store, self.quota)
        self.namespaces = self.caching.namespaces
        self.files = Files(self.store, self.caching, self.quota)
        self.declared = Declared(settings, self.caching, say)
        self.automatic = Automatic(settings, self.caching)
        self.conversations = Conversations(self.caching)
        self.responses = Responses(settings, self.conversations, self.automatic, self.quota)
        self.marks = Breakpoints(self.caching, self.automatic)
        self.grammars = Grammars(settings.max_waiting)
        kept = (self.caching, self.automatic, self.conversations, self.marks)
        self.preparation = Preparation(*kept, self.grammars)
        self.generation = Generation(*kept)
        self.models = Models(
            settings,
            self.store,
            say,
            on_loaded=self.declared.start,
            is_building=self.caching.builds.is_building_for,
        )
        idle_seconds = settings.tune_idle_seconds if settings.tune else 0
        self.remeasuring = Remeasuring(self.store, self.models, self.caching, say, idle_seconds)
        self.verifier = Verifier(self.caching, self.models.all)

    async def load(self) -> None:
        """Returns when every model loaded at the start answers. Raises StartupError."""
        self.lifecycle.start()
        await self.models.load_first()
        self.remeasuring.start()

    async def close(self) -> None:
        await self.remeasuring.close()
        await self.lifecycle.close()
        await self.declared.close()
        await self.marks.close()
        await self.automatic.close()
        await self.conversations.close()
        await self.responses.close()
        await self.caching.close()
        await self.grammars.close()
        await self.models.close()
        self.store.close()

    def target(self, name: str) -> tuple[ServedModel, str | None]:
        """The model of this name, and the cache if the name is `model@cache` or an alias of one. Raises
        ModelNotFound."""
        wanted, cache = split(name, self.settings.aliases)
        if (model := self.models.find(wanted)) is None:
            raise ModelNotFound(
                f"There is no model {name!r}. This server has: {', '.join(self.names())}.", param="model"
            )
        return model, cache

    def model(self, name: str) -> ServedModel:
        """The model of this name or alias. Raises ModelNotFound, also for a name with a cache
        (`model@cache`)."""
        if "@" in name:
            raise ModelNotFound(
                f"{name!r} names a cache too; here a model's name is wanted alone.", param="model"
            )
        return self.target(name)[0]

    def names(self) -> list[str]:
        """Models and aliases."""
        return [*self.models.all, *self.settings.aliases]
