"""Who may work next, where only so many may at once and nobody is to hold up another by asking for much."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from headstart.errors import Overloaded
from headstart.round_robin import RoundRobin

Turn = asyncio.Future[None]


class FairQueue:
    """`places`: how many may work at once. The others wait, at most `most` of them, and owners take turns, so
    that an owner who asks for little waits for what is being done and for one turn of each other owner.

    Where `most` wait already, a newcomer is refused; but if another owner has two more waiting than the
    newcomer's owner has, the last of those is refused in its place. Used from the event loop."""

    def __init__(self, most: int, places: int = 1) -> None:
        self.most = most
        self._free = places
        self._waiting: RoundRobin[Turn] = RoundRobin()

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        """A place, from its turn until the end; who is cancelled while waiting takes none. Raises
        Overloaded."""
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
        """Gives a place that has become free to the next one who still waits for it."""
        while self._waiting:
            turn = self._waiting.take()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
