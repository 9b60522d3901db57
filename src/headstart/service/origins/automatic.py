"""Automatic caches of frequent system prompts, and implicit matches."""

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
from headstart.names import Namespace
from headstart.protocol import Stats
from headstart.service.background import BackgroundTasks
from headstart.service.caching.caching import Caching
from headstart.service.caching.lookup import Start
from headstart.service.interface.observer import Evicted
from headstart.service.models.tenant_model import TenantModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImplicitMatch:
    """The beginning of a request that names no cache: its prefix `prefix` of `boundary` tokens, and the cache
    with exactly this prefix, if there is one."""

    prefix: Content
    boundary: int
    entry: Entry | None = None
    start: Start | None = None


class Automatic:
    """Used from the event loop. Builds caches after answers have ended, one at a time."""

    def __init__(self, settings: Settings, caching: Caching) -> None:
        self.settings = settings
        self.caching = caching
        self.default = [{"role": "system", "content": settings.default_system or ""}]
        self._seen = RecentUse(settings.automatic_window)
        # Names of caches that alone exceed the quota.
        self._too_large: set[str] = set()
        self._turn = asyncio.Lock()
        self._tasks = BackgroundTasks()

    async def close(self) -> None:
        await self._tasks.close()

    def with_default(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with the configured system message, if there is one and they have none."""
        if not self.settings.default_system or any(message["role"] == "system" for message in messages):
            return messages
        return [*self.default, *messages]

    async def look(
        self,
        model: TenantModel,
        prefix: Content,
        tokens: list[int],
        boundary: int,
        expected: list[int] | None = None,
    ) -> ImplicitMatch | None:
        """The implicit match of a request of `tokens` that begins with these messages and tools; `expected`:
        the tokens of these, if known."""
        if not prefix.messages:
            return None
        found = await self.caching.match(model, prefix, tokens, expected)
        return ImplicitMatch(prefix, boundary, *found) if found else ImplicitMatch(prefix, boundary)

    def answered(self, model: TenantModel, match: ImplicitMatch, stats: Stats) -> None:
        """Call after the last byte of the answer was sent; may write to disk and start a build."""
        entry, start = match.entry, match.start
        if entry is None or start is None:
            self._count(model, match)
        elif start.restore and stats.cached_tokens >= match.boundary:
            self.caching.count_hit(entry, match.boundary, stats)
        elif (start.miss or "restore_failed") not in KEEPS_STATE:
            self.caching.rebuild_after_miss(model, entry)

    def _count(self, model: TenantModel, match: ImplicitMatch) -> None:
        settings = self.settings
        is_default = match.prefix == Content(messages=self.default)
        if not settings.automatic or not (is_default or match.boundary > settings.automatic_tokens):
            return
        # The configured system message is not private to a key.
        model = model.for_owner("") if is_default else model
        name = automatic_name(match.prefix)
        enough = 1 if is_default else settings.automatic_after
        if name not in self._too_large and self._seen.again(model.namespace, name, monotonic(), enough):
            self._tasks.start(self.build(model, match.prefix))

    def is_worth_keeping(self, prefix: Content, n_tokens: int) -> bool:
        """Whether an automatic cache of this prefix may be built: it is long enough and wasn't found too
        large."""
        return n_tokens > self.settings.automatic_tokens and automatic_name(prefix) not in self._too_large

    async def build(
        self,
        model: TenantModel,
        prefix: Content,
        retention: Retention = DEFAULT_RETENTION,
        base: Entry | None = None,
    ) -> Entry | None:
        """Builds the cache of a prefix of chats; `base` is a cache with a common prefix. Returns None if that
        fails, which is no error: no client requested it by name."""
        name = automatic_name(prefix)
        prompt = Content(prefix.messages[0]["content"])
        content = prompt if prefix == Content(messages=prompt.prefix_messages) else prefix
        async with self._turn:
            try:
                entry = await self.caching.create(
                    model,
                    name,
                    content,
                    forms=["chat"],
                    retention=retention,
                    origin="automatic",
                    overwrite=False,
                    base=base,
                )
                if entry in self._trim():
                    log.info("%s of %s alone exceeds automatic_quota_mb", name, model.namespace)
                    self._record_too_large(name)
                    return None
                return entry
            except HeadstartError as error:
                log.info("no automatic cache %s of %s: %s", name, model.namespace, error)
                return None

    def _record_too_large(self, name: str) -> None:
        if len(self._too_large) >= MOST:
            self._too_large.clear()
        self._too_large.add(name)

    def _trim(self) -> list[Entry]:
        """Deletes the least recently used automatic caches until the others are within their quota; returns
        the deleted ones."""
        store, deleted = self.caching.store, []
        entries = [e for e in store.entries() if e.origin == "automatic" and not e.retention.pinned]
        entries.sort(key=lambda entry: store.usage(entry).last_used or entry.updated)
        excess = sum(entry.size_bytes for entry in entries) - 1e6 * self.settings.automatic_quota_mb
        for entry in entries:
            if excess <= 0:
                break
            if entry.key not in self.caching.builds:
                store.delete(entry.key)
                self.caching.observer.evicted(Evicted(entry, entry.size_bytes))
                deleted.append(entry)
                excess -= entry.size_bytes
        return deleted


def automatic_name(prefix: Content) -> str:
    written = [prefix.messages, prefix.tools] if prefix.tools else prefix.messages
    return "auto-" + hashlib.sha256(msgspec.json.encode(written)).hexdigest()[:12]


# Limit for each namespace; the least recently used are forgotten first.
MOST = 1000


class RecentUse:
    """Counts recent uses. Times are seconds of a monotonic clock; a use counts for `window` seconds."""

    def __init__(self, window: float) -> None:
        self.window = window
        self._counts: dict[str, OrderedDict[str, deque[float]]] = {}

    def again(self, namespace: Namespace, what: str, now: float, enough: int) -> bool:
        """Counts a use. Returns whether there are `enough` recent ones, including this one; then counting
        restarts."""
        counts = self._counts.setdefault(namespace, OrderedDict())
        times = counts.setdefault(what, deque())
        counts.move_to_end(what)
        if len(counts) > MOST:
            counts.popitem(last=False)
        times.append(now)
        while now - times[0] > self.window:
            times.popleft()
        if len(times) < enough:
            return False
        del counts[what]
        return True
