"""Looks at every cache as the disk has it, tells which would hit, and repairs the others if asked to."""

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
from headstart.names import NAME, NAMESPACE
from headstart.service.caching.caching import Caching
from headstart.service.caching.lookup import miss_reason
from headstart.service.models.model import ServedModel


@dataclass(frozen=True)
class VerifyScope:
    """Which caches are looked at, all unless a model or a name is given. `repair`: those damaged or unfit are
    computed again from their prompts, and a file from which none can be read is set aside; or, with
    `remove_unreadable`, deleted. `owner`: only what belongs to this API key; "": everything."""

    model: str | None = None
    name: str | None = None
    repair: bool = False
    remove_unreadable: bool = False
    owner: str = ""

    def covers(self, namespace: str, name: str) -> bool:
        model, _, owner = namespace.partition("@")
        return self.model in (None, model) and self.name in (None, name) and self.owner in ("", owner)


class Verifier:
    """Works beside requests; what they replace or delete meanwhile is looked at anew or left out."""

    def __init__(self, caching: Caching, models: Mapping[str, ServedModel]) -> None:
        self.caching = caching
        self.store = caching.store
        self.models = models

    async def verify(self, wish: VerifyScope) -> AsyncGenerator[Verdict, None]:
        """Raises CacheNotFound when one is named that isn't there."""
        found = await asyncio.to_thread(orphan_files, self.store.directory)
        self.store.reconcile()
        n_verdicts = 0
        for entry in self.store.entries():
            if wish.covers(entry.namespace, entry.name) and (verdict := await self._entry(entry, wish)):
                n_verdicts += 1
                yield verdict.of(entry.namespace)
        for stray in found:
            if wish.covers(stray.namespace, stray.name) and not self._knows(stray):
                n_verdicts += 1
                yield self._stray(stray, wish).of(stray.namespace)
        if wish.name is not None and not n_verdicts:
            raise CacheNotFound(f"There is no cache {wish.name!r}.", param="cache_name")

    async def _entry(self, entry: Entry, wish: VerifyScope) -> Verdict | None:
        """None: it was deleted meanwhile."""
        model = self._model(entry)
        verdict = await self._look(model, entry)
        try:
            current = self.store.find(entry.namespace, entry.name)
        except CacheNotFound:
            return None
        if current != entry and (current.version, current.identity) != (entry.version, entry.identity):
            return await self._entry(current, wish)
        if not (wish.repair and verdict.is_wrong):
            return verdict
        if model is None:
            return verdict.after("failed", f"{verdict.detail}; it can be repaired where its model is served")
        try:
            await self.caching.rebuilt(model, entry)
        except HeadstartError as error:
            return verdict.after("failed", f"{verdict.detail}; computing it again failed: {error.message}")
        return verdict.after("rebuilt", f"{verdict.detail}; it was computed again")

    async def _look(self, model: ServedModel | None, entry: Entry) -> Verdict:
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

    def _model(self, entry: Entry) -> ServedModel | None:
        """As the cache's owner sees it."""
        model = self.models.get(entry.model)
        return model and model.seen_by(entry.owner)

    def _knows(self, stray: OrphanFile) -> bool:
        """Whether there is a copy of the prompt that the file itself doesn't tell."""
        if not (NAMESPACE.fullmatch(stray.namespace) and NAME.fullmatch(stray.name)):
            return False
        try:
            self.store.find(stray.namespace, stray.name)
        except CacheNotFound:
            return False
        return True

    def _stray(self, stray: OrphanFile, wish: VerifyScope) -> Verdict:
        verdict = judged_stray(stray)
        if not (wish.repair and stray.damaged):
            return verdict
        try:
            if wish.remove_unreadable:
                stray.path.unlink()
                return verdict.after("removed", f"{stray.why}; its prompt can't be read, so it was deleted")
            aside = set_aside(stray.path)
        except OSError as error:
            return verdict.after("failed", f"{stray.why}; it can't be set aside: {error.strerror}")
        return verdict.after(
            "set_aside", f"{stray.why}; its prompt can't be read, so the file was kept as {aside.name}"
        )


# Its states may be used; a hash or the length is wrong, or it can't be read at all; its states were computed
# by or for something else; the file is named after another cache or can't be opened.
State = Literal["ok", "damaged", "unfit", "stray"]
Action = Literal["rebuilt", "set_aside", "removed", "failed"]

UNFIT: frozenset[MissReason] = frozenset(
    {"model_changed", "engine_changed", "settings_changed", "template_changed"}
)


class Verdict(Struct, frozen=True):
    """`would_hit`: whether a request would start from its state; None where nobody can say, because its model
    isn't served. `detail`: in words what is wrong, or was done. `action`: what was done about it. `owner`:
    the API key whose cache it is; None: everyone's."""

    cache_name: str
    model: str
    state: State
    would_hit: bool | None = None
    miss_reason: MissReason | None = None
    detail: str = ""
    action: Action | None = None
    owner: str | None = None

    @property
    def is_wrong(self) -> bool:
        """Something is wrong with it, and still is."""
        return self.state != "ok" and self.action not in ("rebuilt", "removed")

    def of(self, namespace: str) -> Verdict:
        """The same, with the owner of what is on this shelf."""
        return replace(self, owner=namespace.partition("@")[2] or None)

    def after(self, action: Action, detail: str) -> Verdict:
        would_hit = True if action == "rebuilt" else self.would_hit
        return replace(self, action=action, detail=detail, would_hit=would_hit)


def judged(entry: Entry, miss: MissReason | None, detail: str = "") -> Verdict:
    """Of a cache whose model is known. One that can't hit for what it is, too short or given up, is ok."""
    state: State = "damaged" if miss == "corrupt" else "unfit" if miss in UNFIT else "ok"
    return Verdict(
        entry.name, entry.model, state, miss is None, miss, detail or (miss or "").replace("_", " ")
    )


def judged_stray(stray: OrphanFile) -> Verdict:
    state: State = "damaged" if stray.damaged else "stray"
    return Verdict(stray.name, stray.model, state, would_hit=False, detail=stray.why)
