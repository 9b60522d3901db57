"""System prompts that become caches by themselves, and requests that start from a cache they don't name."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict, deque
from dataclasses import dataclass
from time import monotonic
from typing import Any

import msgspec

from headstart.caches.entry import DEFAULT_RETENTION, KEEPS_STATE, Content, Entry, Retention
from headstart.config.settings import Settings
from headstart.errors import HeadstartError
from headstart.protocol import StateRef, Stats
from headstart.service.caching.caching import Caching
from headstart.service.caching.lookup import Start
from headstart.service.models.model import ServedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImplicitMatch:
    """What a request begins with that names no cache: an opening of `boundary` tokens, and the cache with
    just this one, if there is one."""

    begun: Content
    boundary: int
    entry: Entry | None = None
    opening: Start | None = None

    @property
    def restore(self) -> StateRef | None:
        return self.opening.restore if self.opening else None


class Automatic:
    """Used from the event loop. What it makes it makes after answers have ended, one at a time."""

    def __init__(self, settings: Settings, caching: Caching) -> None:
        self.settings = settings
        self.caching = caching
        self.default = [{"role": "system", "content": settings.default_system or ""}]
        self._seen = RecentUse(settings.automatic_window)
        # Those that alone are larger than the quota.
        self._too_large: set[str] = set()
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[Entry | None]] = set()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def with_default(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with the configured system message, if there is one and they have none."""
        if not self.settings.default_system or any(message["role"] == "system" for message in messages):
            return messages
        return [*self.default, *messages]

    async def look(
        self,
        model: ServedModel,
        begun: Content,
        tokens: list[int],
        boundary: int,
        wanted: list[int] | None = None,
    ) -> ImplicitMatch | None:
        """What there is for a request of `tokens` that begins with these messages and tools; `wanted`: the
        tokens of these, if they are known."""
        if not begun.messages:
            return None
        found = await self.caching.unnamed(model, begun, tokens, wanted)
        return ImplicitMatch(begun, boundary, *found) if found else ImplicitMatch(begun, boundary)

    def answered(self, model: ServedModel, unnamed: ImplicitMatch, stats: Stats) -> None:
        """To be told once the answer's end has been sent: this may write to the disk, and build."""
        entry, opening = unnamed.entry, unnamed.opening
        if entry is None or opening is None:
            self._count(model, unnamed)
        elif opening.restore and stats.cached_tokens >= unnamed.boundary:
            self.caching.count_hit(entry, unnamed.boundary, stats)
        elif (opening.miss or "restore_failed") not in KEEPS_STATE:
            self.caching.rebuild_after_miss(model, entry)

    def _count(self, model: ServedModel, unnamed: ImplicitMatch) -> None:
        settings = self.settings
        is_default = unnamed.begun == Content(messages=self.default)
        if not settings.automatic or not (is_default or unnamed.boundary > settings.automatic_tokens):
            return
        # What the configuration says is no secret of a key's.
        model = model.seen_by("") if is_default else model
        name = automatic_name(unnamed.begun)
        enough = 1 if is_default else settings.automatic_after
        if name not in self._too_large and self._seen.again(model.namespace, name, monotonic(), enough):
            task = asyncio.create_task(self.make(model, unnamed.begun))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def is_worth_keeping(self, begun: Content, n_tokens: int) -> bool:
        """Whether a cache of this may be made: it has the least length, and wasn't found too large."""
        return n_tokens > self.settings.automatic_tokens and automatic_name(begun) not in self._too_large

    async def make(
        self,
        model: ServedModel,
        begun: Content,
        terms: Retention = DEFAULT_RETENTION,
        head: Entry | None = None,
    ) -> Entry | None:
        """The cache of what chats begin with; `head` is one that it begins like. None where that can't be
        made, which is no error: nobody asked for it by name."""
        name = automatic_name(begun)
        prompt = Content(begun.messages[0]["content"])
        content = prompt if begun == Content(messages=prompt.opening) else begun
        async with self._turn:
            try:
                entry = await self.caching.create(
                    model,
                    name,
                    content,
                    forms=["chat"],
                    terms=terms,
                    origin="automatic",
                    overwrite=False,
                    head=head,
                )
                if entry in self._trim():
                    log.info("%s of %s alone is larger than automatic_quota_mb", name, model.namespace)
                    self._give_up(name)
                    return None
                return entry
            except HeadstartError as error:
                log.info("no automatic cache %s of %s: %s", name, model.namespace, error)
                return None

    def _give_up(self, name: str) -> None:
        if len(self._too_large) >= MOST:
            self._too_large.clear()
        self._too_large.add(name)

    def _trim(self) -> list[Entry]:
        """Deletes the automatic caches not used for longest until the others keep within their quota; those
        that were deleted."""
        store, deleted = self.caching.store, []
        entries = [e for e in store.entries() if e.origin == "automatic" and not e.terms.pinned]
        entries.sort(key=lambda entry: store.usage(entry).last_used or entry.updated)
        excess = sum(entry.size_bytes for entry in entries) - 1e6 * self.settings.automatic_quota_mb
        for entry in entries:
            if excess <= 0:
                break
            if entry.key not in self.caching.builds:
                store.delete(entry.namespace, entry.name)
                deleted.append(entry)
                excess -= entry.size_bytes
        return deleted


def automatic_name(begun: Content) -> str:
    written = [begun.messages, begun.tools] if begun.tools else begun.messages
    return "auto-" + hashlib.sha256(msgspec.json.encode(written)).hexdigest()[:12]


# Of each shelf; what was not seen for longest is forgotten first.
MOST = 1000


class RecentUse:
    """Times are seconds of any clock that doesn't go back; `window` says for how long one counts."""

    def __init__(self, window: float) -> None:
        self.window = window
        self._shelves: dict[str, OrderedDict[str, deque[float]]] = {}

    def again(self, namespace: str, what: str, now: float, enough: int) -> bool:
        """Whether it has been seen `enough` times now, this one included; then counting begins anew."""
        seen = self._shelves.setdefault(namespace, OrderedDict())
        times = seen.setdefault(what, deque())
        seen.move_to_end(what)
        if len(seen) > MOST:
            seen.popitem(last=False)
        times.append(now)
        while now - times[0] > self.window:
            times.popleft()
        if len(times) < enough:
            return False
        del seen[what]
        return True
