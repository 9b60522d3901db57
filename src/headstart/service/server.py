"""Everything a running server has: its models, its caches, and the answers it gives."""

from __future__ import annotations

import asyncio
import logging

from headstart.caches.store import Store
from headstart.config import Settings
from headstart.errors import ModelNotFound
from headstart.service.caching import Caching
from headstart.service.generation import Generation
from headstart.service.model import Say, ServedModel

log = logging.getLogger(__name__)


class Service:
    """Made, loaded and closed by whoever runs the server, to whom `say` tells what takes time; till loaded,
    models answer ModelLoading."""

    def __init__(self, settings: Settings, say: Say = log.info) -> None:
        self.say = say
        self.settings = settings
        self.store = Store(settings.cache_dir)
        self.caching = Caching(self.store)
        self.generation = Generation(self.caching)
        self.models = {name: ServedModel(name, path, settings) for name, path in settings.model_paths.items()}

    async def load(self) -> None:
        """Returns when every model answers. Raises StartupError."""
        measuring = asyncio.Lock()
        await asyncio.gather(*(model.load(self.store, self.say, measuring) for model in self.models.values()))

    async def close(self) -> None:
        await self.generation.conversations.close()
        await self.caching.close()
        await asyncio.gather(*(model.engine.close() for model in self.models.values()))
        self.store.close()

    def model(self, name: str) -> ServedModel:
        """The model of this name or alias. Raises ModelNotFound."""
        try:
            return self.models[self.settings.aliases.get(name, name)]
        except KeyError:
            raise ModelNotFound(
                f"There is no model {name!r}. This server has: {', '.join(self.names())}.", param="model"
            ) from None

    def names(self) -> list[str]:
        """Models and aliases."""
        return [*self.models, *self.settings.aliases]

    @property
    def ready(self) -> bool:
        return all(model.engine.state == "ready" for model in self.models.values())
