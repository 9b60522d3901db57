"""Decides whether a request may start from a cache, and which caches are built when."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from headstart.caches.entry import DEFAULT_TERMS, KEEPS_STATE, Content, Entry, Form, MissReason, Origin, Terms
from headstart.caches.file import Corrupt
from headstart.caches.store import Store
from headstart.errors import BadRequest, CacheConflict, CacheNotFound
from headstart.messages import StateRef
from headstart.names import check_name
from headstart.service.building import Build, Builder, OnProgress, opening_tokens
from headstart.service.composition import check_own_name, composed
from headstart.service.heads import head_of
from headstart.service.model import ServedModel
from headstart.tokens import common_prefix

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opening:
    """What a named cache does for a request: `boundary` tokens come from `restore`, or why they don't. Then
    `restore` may be another state, which has `shared` tokens in common with the request."""

    boundary: int
    restore: StateRef | None = None
    miss: MissReason | None = None
    shared: int | None = None


class Caching:
    """Used from the event loop. At most one build of a name runs at a time."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.builder = Builder(store)
        self._builds: dict[tuple[str, str], asyncio.Task[Entry]] = {}

    async def close(self) -> None:
        for build in list(self._builds.values()):
            build.cancel()
        await asyncio.gather(*self._builds.values(), return_exceptions=True)

    async def find(self, model: ServedModel, name: str) -> Entry:
        """The named cache, waiting for it where its first build is running. Raises CacheNotFound."""
        check_name(name, param="use_cache")
        try:
            return self.store.find(model.shelf, name)
        except CacheNotFound:
            if not (build := self._builds.get((model.shelf, name))):
                raise
        await asyncio.wait([build])
        return self.store.find(model.shelf, name)

    async def open(self, model: ServedModel, entry: Entry, form: Form, tokens: list[int]) -> Opening | None:
        """How a request whose prompt is `tokens` starts from the cache; None when the cache was replaced or
        built again meanwhile, so that the request has to look at it anew."""
        key = (entry.shelf, entry.name)
        # A build that ends while the old state is looked at is one that had begun before.
        build = self._builds.get(key)
        opening = await self._open(model, entry, form, tokens)
        if opening.miss is None or opening.miss in KEEPS_STATE:
            return opening
        if build := build or self._builds.get(key):
            await asyncio.wait([build])
            return None
        return opening if self._is_latest(model, entry) else None

    async def _open(self, model: ServedModel, entry: Entry, form: Form, tokens: list[int]) -> Opening:
        wanted = await opening_tokens(model, form, entry.content)
        boundary = min(common_prefix(wanted, tokens), len(tokens) - 1)
        if reason := model.fingerprint.changed_since(entry.fingerprint):
            return Opening(boundary, miss=reason)
        if form in entry.evicted and boundary > 0:
            return await self._evicted(model, entry, form, tokens, boundary)
        if form not in entry.forms:
            return Opening(boundary, miss="form_not_built" if wanted else "too_short")
        if boundary <= 0 or (boundary < len(wanted) and not model.info.can_cut):
            return Opening(max(boundary, 0), miss="prompt_differs")
        try:
            state = await self.store.verified(entry, form)
        except Corrupt as error:
            log.warning("cache %s of %s is damaged: %s", entry.name, entry.model, error)
            return Opening(boundary, miss="corrupt")
        if state.tokens != wanted:
            return Opening(boundary, miss="template_changed")
        return Opening(boundary, restore=state.ref)

    async def _evicted(
        self, model: ServedModel, entry: Entry, form: Form, tokens: list[int], boundary: int
    ) -> Opening:
        """The cache has no state, or, being composed of others, not yet."""
        head = await head_of(self.store, model, self._head(model, entry), form, tokens)
        reason: MissReason = "evicted" if entry.version else "first_use"
        return Opening(boundary, head.restore, reason, head.shared)

    def derived(self, model: ServedModel, parts: Sequence[Entry], form: Form) -> Entry:
        """The cache composed of these, which has version 0 as long as it isn't built. Raises BadRequest."""
        entry = composed(model, parts, form)
        return self._current(model, entry.name) or entry

    def _head(self, model: ServedModel, entry: Entry) -> Entry | None:
        """The cache that a derived one begins like."""
        return self._current(model, entry.parts[0]) if entry.parts else None

    async def create(
        self,
        model: ServedModel,
        name: str,
        content: Content,
        *,
        forms: Sequence[Form] | None = None,
        terms: Terms = DEFAULT_TERMS,
        origin: Origin = "client",
        overwrite: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Entry:
        """Computes and stores the states of `content`, in all forms unless some are named; version 1 of the
        entry means that the name was new.

        Raises BadRequest, CacheConflict, StorageError or what the engine raises; then nothing has changed.
        When the caller is cancelled, so is the build."""
        check_own_name(name, param="cache_name")
        if not content.opening:
            raise BadRequest("The prompt is empty: there is nothing to keep.", param="prompt")
        self._check_not_building(model, name)
        previous = self._current(model, name)
        if previous and not overwrite:
            raise CacheConflict(f"There is a cache {name!r} already.", param="cache_name")
        version = previous.version + 1 if previous else 1
        wanted = content.forms if forms is None else forms
        build = self._start(
            Build(model, name, content, wanted, version, terms, origin, previous, on_progress=on_progress)
        )
        try:
            return await asyncio.shield(build)
        finally:
            build.cancel()

    def delete(self, model: ServedModel, name: str) -> None:
        """Raises CacheNotFound, or CacheConflict while the name is being built."""
        check_name(name, param="name")
        self._check_not_building(model, name)
        self.store.delete(model.shelf, name)

    def rebuild(self, model: ServedModel, entry: Entry) -> None:
        """Starts computing the states of `entry` again, unless that is being done or it was replaced;
        requests for it wait."""
        if (entry.shelf, entry.name) not in self._builds and self._is_latest(model, entry):
            forms = (*entry.forms, *entry.evicted) or entry.content.forms
            build = Build(
                model,
                entry.name,
                entry.content,
                forms,
                max(entry.version, 1),
                entry.terms,
                entry.origin,
                previous=entry,
                keep_states=False,
                head=self._head(model, entry),
                parts=entry.parts,
            )
            if entry.parts:
                self.begin((entry.shelf, entry.name), self._derive(build))
            else:
                self._start(build)

    async def _derive(self, build: Build) -> Entry:
        """A derived cache is not kept if one of its parts was replaced or deleted while it was built."""
        entry = await self.builder.build(build)
        parts = [part for name in entry.parts if (part := self._current(build.model, name))]
        whole = len(parts) == len(entry.parts)
        if not (whole and composed(build.model, parts, build.forms[0]).name == entry.name):
            with suppress(CacheNotFound):
                self.store.delete(entry.shelf, entry.name)
        return entry

    def known_opening(self, model: ServedModel, text: str) -> str:
        """The longest cached completion prompt that `text` begins with; "" for none."""
        prompts = (entry for entry in self.store.known(model.shelf) if entry.prompt)
        known = [entry for entry in prompts if text.startswith(entry.prompt)]
        fitting = (e.prompt for e in known if "completion" in e.forms and self._current(model, e.name) == e)
        return max(fitting, key=len, default="")

    def _check_not_building(self, model: ServedModel, name: str) -> None:
        if (model.shelf, name) in self._builds:
            raise CacheConflict(f"The cache {name!r} is being built.", param="cache_name")

    def _current(self, model: ServedModel, name: str) -> Entry | None:
        try:
            return self.store.find(model.shelf, name)
        except CacheNotFound:
            return None

    def _is_latest(self, model: ServedModel, entry: Entry) -> bool:
        """Whether the entry is the cache of its name; one of version 0 is as long as there is none."""
        return self._current(model, entry.name) == (entry if entry.version else None)

    def build_of(self, model: ServedModel, name: str) -> asyncio.Task[Entry] | None:
        """The running build of this name."""
        return self._builds.get((model.shelf, name))

    def _start(self, build: Build) -> asyncio.Task[Entry]:
        return self.begin((build.model.shelf, build.name), self.builder.build(build))

    def begin(self, key: tuple[str, str], building: Coroutine[Any, Any, Entry]) -> asyncio.Task[Entry]:
        """Runs what builds the cache of this shelf and name. If another build of it is running, `building`
        has to wait for that."""
        task = asyncio.create_task(building)
        self._builds[key] = task
        task.add_done_callback(lambda done: self._ended(key, done))
        return task

    def _ended(self, key: tuple[str, str], task: asyncio.Task[Entry]) -> None:
        if self._builds.get(key) is task:
            del self._builds[key]
        if not task.cancelled() and (error := task.exception()):
            log.warning("building cache %s of %s failed: %s", key[1], key[0], error)
