"""A build that several callers wait for: it is computed once, and ends when the last of them has left."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from headstart.caches.entry import Content, Entry, Form, Origin, Terms
from headstart.service.building import OnProgress


@dataclass(frozen=True)
class Asked:
    """What a caller wants to be built. Those who want the same may wait for the same build."""

    content: Content
    forms: frozenset[Form]
    terms: Terms
    origin: Origin

    @classmethod
    def of(cls, content: Content, forms: Sequence[Form], terms: Terms, origin: Origin) -> Asked:
        return cls(content, frozenset(forms), terms, origin)


class Joint:
    """The build of what was `asked`; `task` is to be set as soon as it was started."""

    task: asyncio.Task[Entry]

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.abandoned = False
        self._waiting = 0
        self._told: list[OnProgress] = []

    def tell(self, computed: int, total: int) -> None:
        for tell in self._told:
            tell(computed, total)

    async def join(self, on_progress: OnProgress | None) -> Entry:
        """The build's result, or its error. A caller that is cancelled leaves; the last one ends the build,
        which nobody may join any more."""
        self._waiting += 1
        if on_progress:
            self._told.append(on_progress)
        try:
            return await asyncio.shield(self.task)
        finally:
            self._waiting -= 1
            if on_progress:
                self._told.remove(on_progress)
            if not self._waiting:
                self.abandoned = True
                self.task.cancel()
