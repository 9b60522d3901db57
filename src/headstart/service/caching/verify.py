"""Verifies every cache from the disk, reports which would hit, and repairs the others on request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from headstart.caches.cache_file.format import Corrupt
from headstart.caches.entry import Entry, MissReason
from headstart.caches.scan import OrphanFile, orphan_files, set_aside
from headstart.errors import CacheNotFound, HeadstartError, ModelLoading
from headstart.names import CacheKey, Namespace
from headstart.service.caching.caching import Caching
from headstart.service.caching.lookup import miss_reason
from headstart.service.models.model import ServedModel
from headstart.service.models.tenant_model import TenantModel


@dataclass(frozen=True)
class VerifyScope:
    """The caches to verify: all, unless a model or a name is given. `repair`: damaged or unfit caches are
    rebuilt from their content, and a file that can't be read is set aside or, with `remove_unreadable`,
    deleted. `owner`: only the caches of this API key; "" for all."""

    model: str | None = None
    name: str | None = None
    repair: bool = False
    remove_unreadable: bool = False
    owner: str = ""

    def covers(self, key: CacheKey) -> bool:
        (namespace, name), model = key, key.namespace.model
        return (
            self.model in (None, model) and self.name in (None, name) and self.owner in ("", namespace.owner)
        )


class Verifier:
    """Runs concurrently with requests; a cache that they replace is verified again, one that they delete is
    left out."""

    def __init__(self, caching: Caching, models: Mapping[str, ServedModel]) -> None:
        self.caching = caching
        self.store = caching.store
        self.models = models

    async def verify(self, scope: VerifyScope) -> AsyncGenerator[Verdict, None]:
        """Raises CacheNotFound if `name` is given and there is no such cache."""
        found = await asyncio.to_thread(orphan_files, self.store.directory)
        self.store.reconcile()
        n_verdicts = 0
        for entry in self.store.entries():
            if scope.covers(entry.key) and (verdict := await self._entry(entry, scope)):
                n_verdicts += 1
                yield verdict.of(entry.namespace)
        for orphan in found:
            if scope.covers(orphan.key) and not self._knows(orphan):
                n_verdicts += 1
                yield self._orphan(orphan, scope).of(orphan.namespace)
        if scope.name is not None and not n_verdicts:
            raise CacheNotFound(f"There is no cache {scope.name!r}.", param="cache_name")

    async def _entry(self, entry: Entry, scope: VerifyScope) -> Verdict | None:
        """None if the cache was deleted meanwhile."""
        model = self._model(entry)
        verdict = await self._look(model, entry)
        try:
            current = self.store.find(entry.key)
        except CacheNotFound:
            return None
        if current != entry and (current.version, current.identity) != (entry.version, entry.identity):
            return await self._entry(current, scope)
        if not (scope.repair and verdict.is_wrong):
            return verdict
        if model is None:
            return verdict.after("failed", f"{verdict.detail}; it can be repaired where its model is served")
        try:
            await self.caching.rebuilt(model, entry)
        except HeadstartError as error:
            return verdict.after("failed", f"{verdict.detail}; computing it again failed: {error.message}")
        return verdict.after("rebuilt", f"{verdict.detail}; it was computed again")

    async def _look(self, model: TenantModel | None, entry: Entry) -> Verdict:
        try:
            await self.store.check(entry, from_disk=True)
        except Corrupt as error:
            copied = "; its text is unverified, from the copy of its header"
            return judged(entry, "corrupt", f"{error}{copied if self.store.is_from_copy(entry) else ''}")
        if model is None:
            return Verdict(entry.name, entry.model, "ok", detail="its model is not being served")
        try:
            miss = await miss_reason(self.caching.store, model, entry)
            words = model.fingerprint.differences(entry.fingerprint)
        except ModelLoading as error:
            return Verdict(entry.name, entry.model, "ok", detail=error.message)
        return judged(entry, miss, words)

    def _model(self, entry: Entry) -> TenantModel | None:
        """The model as its owner's requests use it."""
        model = self.models.get(entry.model)
        return model.for_owner(entry.owner) if model else None

    def _knows(self, orphan: OrphanFile) -> bool:
        """Whether the store knows the cache of this file, from a copy of its header."""
        if not orphan.key.is_valid:
            return False
        try:
            self.store.find(orphan.key)
        except CacheNotFound:
            return False
        return True

    def _orphan(self, orphan: OrphanFile, scope: VerifyScope) -> Verdict:
        verdict = judged_orphan(orphan)
        if not (scope.repair and orphan.damaged):
            return verdict
        try:
            if scope.remove_unreadable:
                orphan.path.unlink()
                return verdict.after("removed", f"{orphan.why}; its prompt can't be read, so it was deleted")
            aside = set_aside(orphan.path)
        except OSError as error:
            return verdict.after("failed", f"{orphan.why}; it can't be set aside: {error.strerror}")
        return verdict.after(
            "set_aside", f"{orphan.why}; its prompt can't be read, so the file was kept as {aside.name}"
        )


# ok: its states are usable. damaged: a hash or the length is wrong, or it can't be read. unfit: its states
# were computed by or for something else. stray: the file is named after another cache or can't be opened.
VerdictState = Literal["ok", "damaged", "unfit", "stray"]
VerdictAction = Literal["rebuilt", "set_aside", "removed", "failed"]

UNFIT: frozenset[MissReason] = frozenset(
    {"model_changed", "engine_changed", "settings_changed", "template_changed"}
)


class Verdict(Struct, frozen=True):
    """`would_hit`: whether a request would start from the cache's state; None if unknown because its model
    isn't served. `detail`: the fault or the repair in words. `action`: the repair. `owner`: the API key that
    owns the cache; None if it is public."""

    cache_name: str
    model: str
    state: VerdictState
    would_hit: bool | None = None
    miss_reason: MissReason | None = None
    detail: str = ""
    action: VerdictAction | None = None
    owner: str | None = None

    @property
    def is_wrong(self) -> bool:
        """Whether the cache has a fault that is not repaired."""
        return self.state != "ok" and self.action not in ("rebuilt", "removed")

    def of(self, namespace: Namespace) -> Verdict:
        """A copy with the owner of this namespace."""
        return replace(self, owner=namespace.owner or None)

    def after(self, action: VerdictAction, detail: str) -> Verdict:
        would_hit = True if action == "rebuilt" else self.would_hit
        return replace(self, action=action, detail=detail, would_hit=would_hit)


def judged(entry: Entry, miss: MissReason | None, detail: str = "") -> Verdict:
    """The verdict on a cache of a known model. One that misses without a fault, because it is too short or
    evicted, is "ok"."""
    state: VerdictState = "damaged" if miss == "corrupt" else "unfit" if miss in UNFIT else "ok"
    return Verdict(
        entry.name, entry.model, state, miss is None, miss, detail or (miss or "").replace("_", " ")
    )


def judged_orphan(orphan: OrphanFile) -> Verdict:
    state: VerdictState = "damaged" if orphan.damaged else "stray"
    return Verdict(orphan.name, orphan.model, state, would_hit=False, detail=orphan.why)
