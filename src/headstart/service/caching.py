"""Decides whether a request may start from a cache, and which caches are built when."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from headstart.caches.entry import DEFAULT_TERMS, KEEPS_STATE, Content, Entry, Form, MissReason, Origin, Terms
from headstart.caches.file import Corrupt
from headstart.caches.store import Store
from headstart.errors import BadRequest, CacheConflict, CacheNotFound
from headstart.messages import StateRef
from headstart.names import check_name
from headstart.service.building import Build, Builder, OnProgress, opening_tokens
from headstart.service.joining import Asked, Joint
from headstart.service.model import ServedModel
from headstart.tokens import common_prefix

log = logging.getLogger(__name__)

# Stands for whatever a request has after the cache.
NO_TOKEN = -1


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
        self._builds: dict[tuple[str, str], asyncio.Task[Entry]] = {}
        self._joints: dict[tuple[str, str], Joint] = {}

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

    async def miss_reason(self, model: ServedModel, entry: Entry) -> MissReason | None:
        """Why a request that begins with the cache would not start from its state as things are; None: it
        would. Raises ModelLoading."""
        for form in tuple(entry.forms) or entry.content.forms:
            wanted = await opening_tokens(model, form, entry.content)
            opening = await self._open(model, entry, form, [*wanted, NO_TOKEN])
            if opening.miss:
                return opening.miss
        return None

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

        Callers that ask for the same at the same time get the result of one build; when the last of them is
        cancelled, so is the build. Raises BadRequest, CacheConflict (also while something else is built under
        this name), StorageError or what the engine raises; then nothing has changed."""
        check_name(name, param="cache_name")
        if not content.opening:
            raise BadRequest("The prompt is empty: there is nothing to keep.", param="prompt")
        asked = Asked.of(content, content.forms if forms is None else forms, terms, origin)
        joint = await self._joint(model, name, asked)
        previous = self._current(model, name)
        if previous and not overwrite:
            raise CacheConflict(f"There is a cache {name!r} already.", param="cache_name")
        if joint:
            return await joint.join(on_progress)
        version = previous.version + 1 if previous else 1
        wanted = content.forms if forms is None else forms
        joint = Joint(asked)
        build = Build(model, name, content, wanted, version, terms, origin, previous, on_progress=joint.tell)
        joint.task = self._start(build)
        self._joints[model.shelf, name] = joint
        return await joint.join(on_progress)

    async def _joint(self, model: ServedModel, name: str, asked: Asked) -> Joint | None:
        """The running build of the same; None once there is none of this name. One that everybody has left,
        or that only makes the same content's states anew, is waited for. Raises CacheConflict."""
        key = (model.shelf, name)
        while task := self._builds.get(key):
            joint = self._joints.get(key)
            if joint and joint.asked == asked and not joint.abandoned:
                return joint
            if not (joint.abandoned if joint else self._holds(model, name, asked.content)):
                self._check_not_building(model, name)
            await asyncio.wait([task])
        return None

    def _holds(self, model: ServedModel, name: str, content: Content) -> bool:
        entry = self._current(model, name)
        return entry is not None and entry.content == content

    def delete(self, model: ServedModel, name: str) -> None:
        """Raises CacheNotFound, or CacheConflict while the name is being built."""
        check_name(name, param="name")
        self._check_not_building(model, name)
        self.store.delete(model.shelf, name)

    def rebuild(self, model: ServedModel, entry: Entry) -> None:
        """Starts computing the states of `entry` again, unless that is being done or it was replaced;
        requests for it wait."""
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

    async def rebuilt(self, model: ServedModel, entry: Entry) -> Entry:
        """The entry with its states computed again, once that is done. Raises StorageError or what the
        engine raises."""
        self.rebuild(model, entry)
        if build := self._builds.get((entry.shelf, entry.name)):
            return await asyncio.shield(build)
        return self.store.find(entry.shelf, entry.name, param="name")

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

    def _start(self, build: Build) -> asyncio.Task[Entry]:
        key = (build.model.shelf, build.name)
        task = asyncio.create_task(self.builder.build(build))
        self._builds[key] = task
        task.add_done_callback(lambda done: self._ended(key, done))
        return task

    def _ended(self, key: tuple[str, str], task: asyncio.Task[Entry]) -> None:
        del self._builds[key]
        self._joints.pop(key, None)
        if not task.cancelled() and (error := task.exception()):
            log.warning("building cache %s of %s failed: %s", key[1], key[0], error)
