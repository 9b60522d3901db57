"""A fair queue for a limited number of places: an owner with many requests doesn't delay the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from headstart.errors import Overloaded
from headstart.round_robin import RoundRobin

Turn = asyncio.Future[None]


class FairQueue:
    """`places`: how many requests run at once. At most `most` wait, and owners take turns, so that an owner
    with few requests waits only for running ones and one turn of each other owner.

    If `most` are waiting, a new request is refused; but if another owner has two more waiting than the new
    request's owner, that owner's last one is refused instead. Used from the event loop."""

    def __init__(self, most: int, places: int = 1) -> None:
        self.most = most
        self._free = places
        self._waiting: RoundRobin[Turn] = RoundRobin()

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        """Holds a place from its turn until the end of the context; a request cancelled while waiting takes
        none. Raises Overloaded."""
        if self._free:
            self._free -= 1
        else:
            await self._wait(owner)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, owner: str) -> None:
        self._make_room(owner)
        turn: Turn = asyncio.get_running_loop().create_future()
        self._waiting.put(owner, turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._pass_on()
            raise
        finally:
            self._waiting.remove(owner, turn)

    def _make_room(self, owner: str) -> None:
        if len(self._waiting) < self.most:
            return
        error = Overloaded("As many requests are waiting as may.")
        if not self._waiting:
            raise error
        other, last = self._waiting.last_of_longest()
        if self._waiting.count(other) < self._waiting.count(owner) + 2:
            raise error
        self._waiting.remove(other, last)
        if not last.done():
            last.set_exception(error)

    def _pass_on(self) -> None:
        """Gives a freed place to the next request that still waits."""
        while self._waiting:
            turn = self._waiting.take()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
