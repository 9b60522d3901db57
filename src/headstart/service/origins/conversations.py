"""Stores conversations as caches, each turn under the name of the one before it if requested.

A turn is saved after its answer was sent, so the next request may arrive earlier: it waits. If saving failed,
the request fails, because the cache lacks the last turn and the answer would be to another conversation.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, replace

from headstart.caches.entry import DEFAULT_RETENTION, Content, Entry, Form, Origin, Retention
from headstart.errors import BadRequest, CacheConflict, CacheNotFound, HeadstartError, StorageError
from headstart.names import CacheKey
from headstart.service.caching.builder import Build
from headstart.service.caching.caching import Caching
from headstart.service.caching.derived import check_own_name
from headstart.service.interface.chat import Chat
from headstart.service.models.tenant_model import TenantModel

# How long a stopping server waits for conversations to be saved.
CLOSING_SECONDS = 10.0
CHAT: tuple[Form, ...] = ("chat",)


@dataclass(frozen=True)
class SaveRequest:
    """How to store a chat after its answer. `overwrite` None: it may replace a conversation, but no other
    cache. `base`: the name of the cache that it started from. `retention` None: the retention of the cache
    that it replaces. Without `states` only its content is stored."""

    model: TenantModel
    name: str
    overwrite: bool | None
    chat: Chat
    base: str | None = None
    origin: Origin = "conversation"
    retention: Retention | None = None
    states: bool = True

    @property
    def key(self) -> CacheKey:
        return self.model.key(self.name)


class Conversations:
    """Used from the event loop."""

    def __init__(self, caching: Caching) -> None:
        self.caching = caching
        self._saving: dict[CacheKey, asyncio.Task[Entry]] = {}
        # The error, and the cache under the name at that time.
        self._failed: dict[CacheKey, tuple[HeadstartError, Entry | None]] = {}

    async def close(self) -> None:
        if self._saving:
            await asyncio.wait(self._saving.values(), timeout=CLOSING_SECONDS)

    def check(self, model: TenantModel, name: str, overwrite: bool | None) -> None:
        """Raises InvalidName, or CacheConflict if a conversation may not be saved under this name."""
        check_own_name(name, param="save_as")
        self.caching.check_not_declared(model, name, param="save_as")
        build = self.caching.builds.of(model.key(name))
        is_other = build is not self._saving.get(model.key(name))
        if build and not overwrite and (is_other or overwrite is False):
            raise CacheConflict(f"The cache {name!r} is being built.", param="save_as")
        _check_replaceable(self._current(model, name), overwrite)

    def save(self, saving: SaveRequest, answer: str) -> asyncio.Task[Entry]:
        """Starts saving the chat with its answer; requests for the name wait for it from now on."""
        return self.keep(replace(saving, chat=saving.chat.answered(answer)))

    def keep(self, saving: SaveRequest) -> asyncio.Task[Entry]:
        """Like `save`, for a chat that includes its answer."""
        before = self.caching.builds.of(saving.key)
        task = self.caching.builds.run(saving.key, self._save(saving, before))
        self._saving[saving.key] = task
        task.add_done_callback(lambda done: self._ended(saving.key, done))
        return task

    def being_saved(self, owner: str, name: str) -> asyncio.Task[Entry] | None:
        """The task that saves a conversation of this name in one of the owner's namespaces."""
        saved = (
            task for key, task in self._saving.items() if key.name == name and key.namespace.owner == owner
        )
        return next(saved, None)

    async def wait_saved(self, model: TenantModel, name: str) -> None:
        """Returns when no conversation is being saved under this name. Raises StorageError if the last one
        could not be saved, or BadRequest if it is too large for a cache."""
        key = model.key(name)
        while task := self._saving.get(key):
            await asyncio.wait([task])
        error, instead = self._failed.get(key, (None, None))
        if error and self._current(model, name) == instead:
            message = f"The last turn of {name!r} was not saved: {error.message}"
            raise type(error)(message, param="use_cache")

    async def _save(self, saving: SaveRequest, before: asyncio.Task[Entry] | None) -> Entry:
        if before:
            await asyncio.wait([before])
        previous = self._current(saving.model, saving.name)
        _check_replaceable(previous, saving.overwrite)
        try:
            entry = await self._build(saving, previous)
        except (BadRequest, StorageError) as error:
            # A response has its own name, so no older turn is stored under it.
            if saving.origin == "conversation":
                self._failed[saving.key] = (error, previous)
            raise
        self._failed.pop(saving.key, None)
        return entry

    async def _build(self, saving: SaveRequest, previous: Entry | None) -> Entry:
        """Builds the cache. It is stored without a state if the engine can't compute that now, or if it is a
        response and there is no room for the state."""
        content = Content(messages=saving.chat.messages, tools=saving.chat.tools)
        kept = previous.retention if previous else DEFAULT_RETENTION
        base = self._current(saving.model, saving.base) if saving.base else previous
        build = Build(
            saving.model,
            saving.name,
            content,
            CHAT,
            previous.version + 1 if previous else 1,
            saving.retention or kept,
            saving.origin,
            previous,
            base=base,
        )
        without = replace(build, forms=(), evicted=CHAT)
        try:
            return await self.caching.builder.build(build if saving.states else without)
        except HeadstartError as error:
            if isinstance(error, StorageError) and saving.origin == "conversation":
                raise
            return await self.caching.builder.build(without)

    def _ended(self, key: CacheKey, task: asyncio.Task[Entry]) -> None:
        if self._saving.get(key) is task:
            del self._saving[key]

    def _current(self, model: TenantModel, name: str) -> Entry | None:
        with suppress(CacheNotFound):
            return self.caching.store.find(model.key(name))
        return None


def _check_replaceable(entry: Entry | None, overwrite: bool | None) -> None:
    """Raises CacheConflict."""
    if entry is None or overwrite or (overwrite is None and entry.origin == "conversation"):
        return
    kind = "conversation" if entry.origin == "conversation" else "cache"
    raise CacheConflict(
        f'There is a {kind} {entry.name!r} already; "allow_overwrite": true replaces it.', param="save_as"
    )
