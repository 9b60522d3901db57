"""Decides whether a request may start from a cache, and which caches are built when."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headstart.caches.entry import DEFAULT_TERMS, KEEPS_STATE, Content, Entry, Form, MissReason, Origin, Terms
from headstart.caches.file import Corrupt
from headstart.caches.store import Store
from headstart.errors import BadRequest, CacheConflict, CacheNotFound
from headstart.messages import StateRef
from headstart.names import check_name, shelves
from headstart.service.building import Build, Builder, OnProgress, opening_tokens
from headstart.service.model import ServedModel
from headstart.service.promises import Promises
from headstart.tokens import common_prefix

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opening:
    """What a named cache does for a request: `boundary` tokens come from `restore`, or why they don't."""

    boundary: int
    restore: StateRef | None = None
    miss: MissReason | None = None


class Caching:
    """Used from the event loop. At most one build of a name runs at a time."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.builder = Builder(store)
        self.promises = Promises()
        self._builds: dict[tuple[str, str], asyncio.Task[Entry]] = {}

    async def close(self) -> None:
        for build in list(self._builds.values()):
            build.cancel()
        await asyncio.gather(*self._builds.values(), return_exceptions=True)

    async def find(self, model: ServedModel, name: str) -> Entry:
        """The named cache, the owner's or everyone's, waiting for it where its first build is running or it
        was promised. Raises CacheNotFound, or why a promise was not kept."""
        check_name(name, param="use_cache")
        for shelf in shelves(model.shelf):
            await self.promises.settled((shelf, name))
            if (build := self._builds.get((shelf, name))) and not self._at(shelf, name):
                await asyncio.wait([build])
            if entry := self._at(shelf, name):
                return entry
        return self.store.find(model.shelf, name)

    def look_up(self, model: ServedModel, name: str, *, param: str) -> Entry:
        """The named cache, the owner's or everyone's, as it is now. Raises InvalidName or CacheNotFound."""
        check_name(name, param=param)
        entries = filter(None, (self._at(shelf, name) for shelf in shelves(model.shelf)))
        return next(entries, None) or self.store.find(model.shelf, name, param=param)

    async def unnamed(
        self, model: ServedModel, system: list[dict[str, Any]], tokens: list[int]
    ) -> tuple[Entry, Opening] | None:
        """The cache whose chats begin with just these messages, and what it does for a request of `tokens`
        that doesn't name it; no build is waited for."""
        for entry in (entry for shelf in shelves(model.shelf) for entry in self.store.known(shelf)):
            is_for_chats = "chat" in entry.forms or "chat" in entry.evicted
            if is_for_chats and not entry.tools and entry.content.opening == system:
                return entry, await self._open(model, entry, "chat", tokens)
        return None

    def is_building(self, entry: Entry) -> bool:
        return (entry.shelf, entry.name) in self._builds

    def visible(self, owner: str, model: str | None = None) -> list[Entry]:
        """The owner's caches and everyone's, by model and name; of two with the same name the owner's."""
        wanted = [e for e in self.store.list() if e.owner in ("", owner) and model in (None, e.model)]
        by_name = {(e.model, e.name): e for e in sorted(wanted, key=lambda entry: entry.owner)}
        return [by_name[key] for key in sorted(by_name)]

    def building(self, owner: str, model: str | None = None) -> list[tuple[str, str]]:
        """Model and name of what `visible` would list and is being built or is to be."""
        keys = {(*shelf.partition("@")[::2], name) for shelf, name in (*self._builds, *self.promises.open())}
        return sorted(
            (one, name) for one, whose, name in keys if whose in ("", owner) and model in (None, one)
        )

    @property
    def n_building(self) -> int:
        return len({*self._builds, *self.promises.open()})

    async def open(self, model: ServedModel, entry: Entry, form: Form, tokens: list[int]) -> Opening | None:
        """How a request whose prompt is `tokens` starts from the cache; None when the cache was replaced or
        built again meanwhile, so that the request has to look at it anew."""
        model = model.seen_by(entry.owner)
        key = (entry.shelf, entry.name)
        # A build that ends while the old state is looked at is one that had begun before.
        build = self._builds.get(key)
        opening = await self._open(model, entry, form, tokens)
        if opening.miss is None or opening.miss in KEEPS_STATE:
            return opening
        if build := build or self._builds.get(key):
            await asyncio.wait([build])
            return None
        return opening if self._current(model, entry.name) == entry else None

    async def _open(self, model: ServedModel, entry: Entry, form: Form, tokens: list[int]) -> Opening:
        wanted = await opening_tokens(model, form, entry.content)
        boundary = min(common_prefix(wanted, tokens), len(tokens) - 1)
        if reason := model.fingerprint.changed_since(entry.fingerprint):
            return Opening(boundary, miss=reason)
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
        check_name(name, param="cache_name")
        if not content.opening:
            raise BadRequest("The prompt is empty: there is nothing to keep.", param="prompt")
        if origin != "declared":
            self._check_not_declared(model, name, param="cache_name")
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
        """Raises CacheNotFound, or CacheConflict while the name is being built and where the client may not:
        it is declared, or everyone's and the model is seen by an owner."""
        check_name(name, param="name")
        self._check_not_declared(model, name, param="name")
        if model.owner and not self._current(model, name) and self._at(model.name, name):
            raise CacheConflict(f"The cache {name!r} is everyone's; no API key can delete it.", param="name")
        self._check_not_building(model, name)
        self.store.delete(model.shelf, name)

    def rebuild(self, model: ServedModel, entry: Entry) -> None:
        """Starts computing the states of `entry` again, unless that is being done or it was replaced;
        requests for it wait."""
        model = model.seen_by(entry.owner)
        if (entry.shelf, entry.name) not in self._builds and self._current(model, entry.name) == entry:
            forms = tuple(entry.forms) or entry.content.forms
            self._start(
                Build(
                    model,
                    entry.name,
                    entry.content,
                    forms,
                    entry.version,
                    entry.terms,
                    entry.origin,
                    previous=entry,
                    keep_states=False,
                )
            )

    def known_opening(self, model: ServedModel, text: str) -> str:
        """The longest cached completion prompt that `text` begins with; "" for none."""
        entries = (entry for shelf in shelves(model.shelf) for entry in self.store.known(shelf))
        known = [entry for entry in entries if entry.prompt and text.startswith(entry.prompt)]
        fitting = (e.prompt for e in known if "completion" in e.forms and self._at(e.shelf, e.name) == e)
        return max(fitting, key=len, default="")

    def _check_not_declared(self, model: ServedModel, name: str, *, param: str) -> None:
        if (model.shelf, name) in self.promises:
            raise CacheConflict(
                f"The cache {name!r} is declared in the server's configuration; change it there.", param=param
            )

    def _check_not_building(self, model: ServedModel, name: str) -> None:
        if (model.shelf, name) in self._builds:
            raise CacheConflict(f"The cache {name!r} is being built.", param="cache_name")

    def _current(self, model: ServedModel, name: str) -> Entry | None:
        return self._at(model.shelf, name)

    def _at(self, shelf: str, name: str) -> Entry | None:
        try:
            return self.store.find(shelf, name)
        except CacheNotFound:
            return None

    def _start(self, build: Build) -> asyncio.Task[Entry]:
        key = (build.model.shelf, build.name)
        task = asyncio.create_task(self.builder.build(build))
        self._builds[key] = task
        task.add_done_callback(lambda done: self._ended(key, done))
        return task

    def _ended(self, key: tuple[str, str], task: asyncio.Task[Entry]) -> None:
        del self._builds[key]
        if not task.cancelled() and (error := task.exception()):
            log.warning("building cache %s of %s failed: %s", key[1], key[0], error)
