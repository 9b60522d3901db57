"""Declared caches: built in the background after a start."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from headstart.caches.entry import Content, Entry, Fingerprint, Form, Retention
from headstart.config.settings import Settings
from headstart.errors import CacheNotFound, EngineDied, HeadstartError, ModelLoading, Overloaded, Unavailable
from headstart.names import CacheKey, Namespace
from headstart.service.background import BackgroundTasks
from headstart.service.caching.caching import Caching
from headstart.service.models.model import Notify
from headstart.service.models.tenant_model import TenantModel

log = logging.getLogger(__name__)

# Attempts at a build whose worker dies: the text may be the cause.
ATTEMPTS = 3
WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class Declaration:
    model: str
    name: str
    content: Content
    forms: tuple[Form, ...]
    retention: Retention

    @property
    def key(self) -> CacheKey:
        """The key in the model's public namespace: declared caches are public."""
        return CacheKey(Namespace(self.model), self.name)

    def is_satisfied_by(self, entry: Entry, fingerprint: Fingerprint) -> bool:
        """Whether the cache needs no build or change. Evicted states are not rebuilt."""
        return (
            (entry.origin, entry.content, entry.retention) == ("declared", self.content, self.retention)
            and {*entry.forms, *entry.evicted} == set(self.forms)
            and entry.fingerprint == fingerprint
        )


def declarations(settings: Settings) -> list[Declaration]:
    """The declared caches of the configuration. Raises StartupError for a text that can't be read."""
    first = next(iter(settings.model_paths), "")
    return [
        Declaration(
            cache.model or first,
            name,
            Content(cache.text(name, settings.folder)),
            cast("tuple[Form, ...]", tuple(dict.fromkeys(cache.forms))),
            Retention(cache.ttl_seconds, cache.pinned, cache.description),
        )
        for name, cache in settings.caches.items()
    ]


class Declared:
    """As soon as this object exists, requests that name a declared cache wait until it is as declared. A
    failed build is reported to them; it is tried again at the next start."""

    def __init__(self, settings: Settings, caching: Caching, say: Notify) -> None:
        self.declarations = declarations(settings)
        self.prune = settings.prune_declared
        self.caching = caching
        self.say = say
        self._tasks = BackgroundTasks()
        for declaration in self.declarations:
            caching.pending_declared.add(declaration.key)

    def start(self, model: TenantModel) -> None:
        """Builds the model's declared caches, one after the other; the model must be loaded."""
        self._tasks.start(self._reconcile(model))

    async def close(self) -> None:
        await self._tasks.close()

    async def _reconcile(self, model: TenantModel) -> None:
        declared = [one for one in self.declarations if one.model == model.name]
        try:
            await self._build_missing(model, declared)
        except Exception as error:
            log.exception("the declared caches of %s were not checked", model.name)
            self._fail_unresolved(declared, _as_known(error))
        except asyncio.CancelledError:
            self._fail_unresolved(declared, Unavailable("The server is being stopped."))
            raise

    def _fail_unresolved(self, declared: Sequence[Declaration], error: HeadstartError) -> None:
        """Fails the caches not yet built; requests would wait for them forever."""
        unresolved = set(self.caching.pending_declared.unresolved())
        for one in declared:
            if one.key in unresolved:
                self.caching.pending_declared.resolve(one.key, error)

    async def _build_missing(self, model: TenantModel, declared: Sequence[Declaration]) -> None:
        missing = [one for one in declared if not self._is_met(model, one)]
        # Existing caches wait for no build.
        for one in declared:
            if one not in missing:
                self.caching.pending_declared.resolve(one.key)
        if self.prune:
            self._prune(model, {one.name for one in declared})
        for number, one in enumerate(missing, 1):
            self.say(f"Building cache {one.name} of {model.name} ({number} of {len(missing)}) ...")
            self.caching.pending_declared.resolve(one.key, await self._failure(model, one))

    def _is_met(self, model: TenantModel, declaration: Declaration) -> bool:
        try:
            entry = self.caching.store.find(model.key(declaration.name))
        except CacheNotFound:
            return False
        return declaration.is_satisfied_by(entry, model.fingerprint)

    def _prune(self, model: TenantModel, declared: set[str]) -> None:
        for entry in self.caching.store.entries(model.namespace):
            if entry.origin == "declared" and entry.name not in declared:
                try:
                    self.caching.delete(model, entry.name)
                    self.say(f"Deleted cache {entry.name} of {model.name}: it is no longer declared")
                except HeadstartError as error:
                    log.warning("cache %s of %s is no longer declared, but %s", entry.name, model.name, error)

    async def _failure(self, model: TenantModel, declaration: Declaration) -> HeadstartError | None:
        """Builds the cache; returns the error if that fails."""
        try:
            entry = await self._build(model, declaration)
        except HeadstartError as error:
            failure = error
        except Exception as error:
            log.exception("building cache %s of %s failed", declaration.name, model.name)
            failure = _as_known(error)
        else:
            self.say(f"Built cache {entry.name} of {model.name}: {entry.n_tokens} tokens")
            return None
        self.say(f"Cache {declaration.name} of {model.name} can't be built: {failure.message}")
        return failure

    async def _build(self, model: TenantModel, declaration: Declaration) -> Entry:
        """Builds the cache; retries after temporary errors: a full queue, a worker that died."""
        deaths = 0
        while True:
            try:
                return await self.caching.create(
                    model,
                    declaration.name,
                    declaration.content,
                    forms=declaration.forms,
                    retention=declaration.retention,
                    origin="declared",
                )
            except EngineDied:
                if (deaths := deaths + 1) == ATTEMPTS:
                    raise
            except (ModelLoading, Overloaded):
                pass
            await asyncio.sleep(WAIT_SECONDS)


def _as_known(error: Exception) -> HeadstartError:
    if isinstance(error, HeadstartError):
        return error
    return HeadstartError("An unexpected error in the server; its log has details.")
