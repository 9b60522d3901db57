"""Breakpoints: positions in a chat up to which its client wants the state kept, so that later chats start
from there.

The state is stored as an automatic cache whose lifetime restarts with each use. It is built after the answer,
from the state that is still in memory, and later chats find it as they find any cache of their prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from headstart.caches.entry import Content, Entry, Retention
from headstart.errors import HeadstartError
from headstart.service.background import BackgroundTasks
from headstart.service.caching.builder import prefix_tokens_if_any
from headstart.service.caching.caching import Caching
from headstart.service.interface.chat import Chat
from headstart.service.interface.options import Breakpoint
from headstart.service.models.tenant_model import TenantModel
from headstart.service.origins.automatic import Automatic
from headstart.tokens import common_prefix

# How long a stopping server waits for outstanding caches.
CLOSING_SECONDS = 10.0


@dataclass(frozen=True)
class PlacedBreakpoint:
    """A breakpoint in a prompt: the state of its first `boundary` tokens is that of `content`. `is_new`: it
    isn't stored yet."""

    content: Content
    boundary: int
    ttl_seconds: float
    is_new: bool = True


@dataclass(frozen=True)
class BreakpointPlan:
    """The breakpoints of a prompt, the longest last. `base`: the cache that the request started from if the
    longest breakpoint had no state yet."""

    places: Sequence[PlacedBreakpoint] = ()
    base: Entry | None = None

    def written(self, cached_tokens: int) -> dict[float, int]:
        """The number of evaluated tokens that are written to new states, by the seconds these are kept."""
        written: dict[float, int] = {}
        at = cached_tokens
        for place in filter(lambda place: place.is_new, self.places):
            written[place.ttl_seconds] = written.get(place.ttl_seconds, 0) + max(place.boundary - at, 0)
            at = max(at, place.boundary)
        return written


class Breakpoints:
    """Used from the event loop."""

    def __init__(self, caching: Caching, automatic: Automatic) -> None:
        self.caching = caching
        self.automatic = automatic
        self._tasks = BackgroundTasks(grace=CLOSING_SECONDS)

    async def close(self) -> None:
        await self._tasks.close()

    async def place(
        self, model: TenantModel, chat: Chat, breakpoints: Sequence[Breakpoint], tokens: list[int]
    ) -> list[PlacedBreakpoint]:
        """The positions of the breakpoints in the chat's tokens, in order; without those whose prefix is too
        short or too large to be cached."""
        found: dict[int, PlacedBreakpoint] = {}
        for each in breakpoints:
            content = chat.up_to(each.messages, each.characters)
            expected = await prefix_tokens_if_any(model, "chat", content)
            boundary = min(common_prefix(expected, tokens), len(tokens) - 1)
            if self.automatic.is_worth_keeping(content, boundary):
                longest = max(each.ttl_seconds, found[boundary].ttl_seconds if boundary in found else 0)
                found[boundary] = PlacedBreakpoint(
                    content, boundary, longest, self.caching.holding(model, content) is None
                )
        return [found[boundary] for boundary in sorted(found)]

    def answered(self, model: TenantModel, plan: BreakpointPlan) -> None:
        """Call after the last byte of the answer was sent: stores what isn't stored yet, and records a use of
        the rest."""
        missing = []
        for place in reversed(plan.places):
            entry = self.caching.holding(model, place.content)
            if entry is None or _ends_early(entry, place):
                missing.append(place)
            if entry:
                self.caching.touch(entry)
        if plan.base:
            self.caching.touch(plan.base)
        if missing:
            self._tasks.start(self._keep(model, missing, plan.base))

    async def _keep(
        self, model: TenantModel, missing: Sequence[PlacedBreakpoint], base: Entry | None
    ) -> None:
        """Stores the longest first, since its tokens are still in memory; the others are prefixes of it."""
        for place in missing:
            if entry := self.caching.holding(model, place.content):
                with suppress(HeadstartError):
                    given = {"ttl_seconds": place.ttl_seconds}
                    base = await self.caching.edit(model.for_owner(entry.owner), entry.name, given)
            else:
                retention = Retention(ttl_seconds=place.ttl_seconds)
                base = await self.automatic.build(model, place.content, retention, base) or base


def _ends_early(entry: Entry, place: PlacedBreakpoint) -> bool:
    """Whether the cache was created for a breakpoint with a shorter lifetime."""
    ttl = entry.retention.ttl_seconds
    return entry.origin == "automatic" and ttl is not None and ttl < place.ttl_seconds
