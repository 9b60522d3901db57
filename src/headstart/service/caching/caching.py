"""Decides whether a request may start from a cache, and which caches are built when."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from msgspec.structs import replace

from headstart.caches.entry import DEFAULT_RETENTION, KEEPS_STATE, Content, Entry, Form, Origin, Retention
from headstart.errors import BadRequest, CacheConflict, CacheNotFound
from headstart.names import CacheKey, check_name
from headstart.protocol import Stats
from headstart.service.caching.builder import Build, Builder, OnProgress
from headstart.service.caching.builds import BuildKey, Builds, PendingDeclared, SharedBuild
from headstart.service.caching.catalog import NamespaceCatalog
from headstart.service.caching.derived import check_own_name, composed
from headstart.service.caching.lookup import Start, decide_start
from headstart.service.caching.quota import Quota
from headstart.service.interface.sameness import written_alike
from headstart.service.models.tenant_model import TenantModel

log = logging.getLogger(__name__)


class Caching:
    """Used from the event loop. At most one build of a name runs at a time."""

    def __init__(self, quota: Quota) -> None:
        self.store = quota.store
        self.observer = quota.observer
        self.builder = Builder(quota)
        self.pending_declared = PendingDeclared()
        self.namespaces = NamespaceCatalog(self.store)
        self.builds = Builds(self.store, self.observer)

    async def close(self) -> None:
        await self.builds.close()

    async def find(self, model: TenantModel, name: str) -> Entry:
        """The named cache of the owner or else the public one. Waits if it is declared or its first build is
        running. Raises CacheNotFound, or the error of a failed declared build."""
        check_name(name, param="use_cache")
        for namespace in model.namespace.visible:
            key = CacheKey(namespace, name)
            await self.pending_declared.wait_resolved(key)
            if (build := self.builds.of(key)) and not self.namespaces.at(key):
                await asyncio.wait([build])
            if entry := self.namespaces.at(key):
                return entry
        return self.store.find(model.key(name))

    async def match(
        self, model: TenantModel, prefix: Content, tokens: list[int], expected: list[int] | None = None
    ) -> tuple[Entry, Start] | None:
        """For a chat that names no cache: the cache that begins with exactly these messages and tools, and
        how a request of `tokens` starts from it. Doesn't wait for builds. `expected` is as in
        `decide_start`."""
        if (entry := self.holding(model, prefix)) is None:
            return None
        return entry, await decide_start(self.store, model, entry, "chat", tokens, expected=expected)

    def holding(self, model: TenantModel, prefix: Content) -> Entry | None:
        """The cache with exactly these messages and tools, written alike."""
        written = [prefix.messages, prefix.tools]
        known = self.namespaces.known(model, "chat")
        found = (e for e in known if written_alike([e.content.prefix_messages, e.tools], written))
        return next(found, None)

    def count_hit(self, entry: Entry, boundary: int, stats: Stats) -> None:
        """Counts the hit of a request that began with `boundary` tokens of the cache. Writes to the disk:
        call after the answer's end."""
        self.store.used(entry, min(stats.cached_tokens, boundary), stats.restore_ms)

    def touch(self, entry: Entry) -> None:
        """Records a use that is not a hit."""
        self.store.touch(entry)

    def building(self, owner: str | None, model: str | None = None) -> list[tuple[str, str]]:
        """Model and name of each cache that `visible` would list and that is being built or is declared and
        not yet built. `owner` None: those of all owners."""
        keys = {*self.builds, *self.pending_declared.unresolved()}
        return sorted(
            (namespace.model, name)
            for namespace, name in keys
            if owner is None or namespace.owner in ("", owner)
            if model in (None, namespace.model)
        )

    async def open(
        self,
        model: TenantModel,
        entry: Entry,
        form: Form,
        tokens: list[int],
        expected: list[int] | None = None,
    ) -> Start | None:
        """How a request with the prompt `tokens` starts from the cache. None if the cache was replaced or
        rebuilt meanwhile: the caller must look it up again. `expected` is as in `decide_start`."""
        model = model.for_owner(entry.owner)
        key = entry.key
        # Read before the state: a build that ends while the old state is checked had begun before.
        build = self.builds.of(key)
        start = await decide_start(self.store, model, entry, form, tokens, self._base(model, entry), expected)
        if start.miss is None or start.miss in KEEPS_STATE:
            return start
        if build := build or self.builds.of(key):
            await asyncio.wait([build])
            return None
        return start if self._is_latest(model, entry) else None

    async def create(
        self,
        model: TenantModel,
        name: str,
        content: Content,
        *,
        forms: Sequence[Form] | None = None,
        retention: Retention | None = None,
        origin: Origin = "client",
        overwrite: bool = True,
        on_progress: OnProgress | None = None,
        base: Entry | None = None,
    ) -> Entry:
        """Computes and stores the states of `content`, in all forms unless `forms` is given. An entry with
        version 1 is a new cache. Without `retention`, an existing cache keeps its retention. `base` is as in
        Build.

        Callers with the same request at the same time share one build; it is cancelled when its last caller
        is. Raises BadRequest, CacheConflict (also while another build of this name is running), StorageError
        or an error of the engine; then nothing has changed."""
        check_own_name(name, param="cache_name")
        if not content.prefix_messages:
            raise BadRequest("The prompt is empty: there is nothing to cache.", param="prompt")
        if origin != "declared":
            self.check_not_declared(model, name, param="cache_name")
        kept = retention or self.retention(model, name)
        build_key = BuildKey.of(content, content.forms if forms is None else forms, kept, origin)
        shared = await self._shared_build(model, name, build_key)
        previous = self.namespaces.own(model, name)
        if previous and not overwrite:
            raise CacheConflict(f"There is a cache {name!r} already.", param="cache_name")
        if shared:
            return await shared.join(on_progress)
        version = previous.version + 1 if previous else 1
        requested = content.forms if forms is None else forms
        shared = SharedBuild(build_key)
        build = Build(
            model,
            name,
            content,
            requested,
            version,
            kept,
            origin,
            previous,
            on_progress=shared.tell,
            base=base,
        )
        self.builds.share(model.key(name), shared, self.builder.build(build))
        return await shared.join(on_progress)

    async def _shared_build(self, model: TenantModel, name: str, build_key: BuildKey) -> SharedBuild | None:
        """The running build with this key, or None as soon as no build of this name runs. Waits for an
        abandoned build, and for one that only recomputes the states of the same content. Raises CacheConflict
        for other builds."""
        key = model.key(name)
        while task := self.builds.of(key):
            shared = self.builds.shared(key)
            if shared and shared.build_key == build_key and not shared.abandoned:
                return shared
            if not (shared.abandoned if shared else self._holds(model, name, build_key.content)):
                self.builds.check_none(key)
            await asyncio.wait([task])
        return None

    def _holds(self, model: TenantModel, name: str, content: Content) -> bool:
        entry = self.namespaces.own(model, name)
        return entry is not None and entry.content == content

    def retention(self, model: TenantModel, name: str) -> Retention:
        """Retention of the named cache, or the default for a new one. Raises InvalidName."""
        previous = self.namespaces.own(model, check_name(name, param="cache_name"))
        return previous.retention if previous else DEFAULT_RETENTION

    async def edit(self, model: TenantModel, name: str, given: Mapping[str, Any]) -> Entry:
        """Changes only the `given` fields of a cache's retention; waits for a running build of it. The
        lifetime restarts if `ttl_seconds` is given. Raises BadRequest, CacheNotFound or StorageError."""
        check_name(name, param="name")
        while True:
            if build := self.builds.of(model.key(name)):
                await asyncio.wait([build])
            entry = self.store.find(model.key(name), param="name")
            if entry.origin == "response" and "metadata" in given:
                raise BadRequest("The metadata of a response can't be edited.", param="metadata")
            updated = self.store.clock() if "ttl_seconds" in given else entry.updated
            changed = replace(entry, retention=replace(entry.retention, **given), updated=updated)
            if amended := await self.store.amend(entry, changed):
                return amended

    def delete(self, model: TenantModel, name: str) -> None:
        """Raises CacheNotFound, or CacheConflict if the cache is being built or declared."""
        check_name(name, param="name")
        self.check_not_declared(model, name, param="name")
        self.builds.check_none(model.key(name))
        self.store.delete(model.key(name))

    def rebuild(self, model: TenantModel, entry: Entry) -> None:
        """Starts recomputing the states of `entry`, unless a build of it is running or it was replaced;
        requests for it wait."""
        model = model.for_owner(entry.owner)
        if entry.key in self.builds or not self._is_latest(model, entry):
            return
        build = Build(
            model,
            entry.name,
            entry.content,
            (*entry.forms, *entry.evicted) or entry.content.forms,
            max(entry.version, 1),
            entry.retention,
            entry.origin,
            previous=entry,
            keep_states=False,
            base=self._base(model, entry),
            parts=entry.parts,
        )
        work = self._derive(build) if entry.parts else self.builder.build(build)
        self.builds.run(entry.key, work)

    def rebuild_after_miss(self, model: TenantModel, entry: Entry) -> None:
        """Rebuilds the cache that a request missed. Responses are not rebuilt: a response that continues them
        is stored with a state of its own."""
        if entry.origin != "response":
            self.rebuild(model, entry)

    def derived(self, model: TenantModel, parts: Sequence[Entry], form: Form) -> Entry:
        """The derived cache of these parts; version 0 if it isn't built. Raises BadRequest."""
        entry = composed(model, parts, form)
        return self.namespaces.own(model, entry.name) or entry

    def _base(self, model: TenantModel, entry: Entry) -> Entry | None:
        """The first part of a derived cache, which is its prefix."""
        return self.namespaces.find_visible(model, entry.parts[0]) if entry.parts else None

    async def _derive(self, build: Build) -> Entry:
        """Builds a derived cache, and deletes it again if one of its parts was replaced or deleted
        meanwhile."""
        entry = await self.builder.build(build)
        parts = [part for name in entry.parts if (part := self.namespaces.find_visible(build.model, name))]
        whole = len(parts) == len(entry.parts)
        if not (whole and composed(build.model, parts, build.forms[0]).name == entry.name):
            with suppress(CacheNotFound):
                self.store.delete(entry.key)
        return entry

    async def rebuilt(self, model: TenantModel, entry: Entry) -> Entry:
        """The entry after its states were recomputed. Raises StorageError or an error of the engine."""
        self.rebuild(model, entry)
        if build := self.builds.of(entry.key):
            return await asyncio.shield(build)
        return self.store.find(entry.key, param="name")

    def is_declared(self, model: TenantModel, name: str) -> bool:
        return model.key(name) in self.pending_declared

    def check_not_declared(self, model: TenantModel, name: str, *, param: str) -> None:
        """Raises CacheConflict."""
        if self.is_declared(model, name):
            raise CacheConflict(
                f"The cache {name!r} is declared in the server's configuration; change it there.", param=param
            )

    def _is_latest(self, model: TenantModel, entry: Entry) -> bool:
        """Whether the entry is the current cache of its name. For version 0: whether there is no cache of
        that name."""
        return self.namespaces.own(model, entry.name) == (entry if entry.version else None)
