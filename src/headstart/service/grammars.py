"""Whether a grammar can be used, as processes beside the server find out.

To use it: make the grammar with `headstart.service.structure` (`json_grammar`, `regex_grammar`,
`lark_grammar`), then

    await service.grammars.check(grammar, param="tools", owner=model.owner)

which raises BadRequest with the compiler's reason and else returns nothing; the grammar then goes to the
engine as `Sampling.grammar`. What was found is remembered, so checking a grammar again costs nothing.

Each check is tried for a moment first, and most need no more. What takes longer goes to the end of a second
queue with a process of its own: however many such grammars are sent, and by whomever, they hold up one
another and not the others. In both queues the API keys take turns.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field

from headstart.errors import BadRequest, Overloaded
from headstart.service.checker import ENDED, Checker, TookTooLong
from headstart.service.fair_queue import FairQueue

MAX_BYTES = 256 << 10
REMEMBERED = 4096
# Of processor time: honest schemas take some milliseconds.
QUICK_SECONDS = 0.1
MOST_SECONDS = 2.0

Key = tuple[str, bytes]


@dataclass
class Lane:
    """One process, and the queue before it."""

    checker: Checker
    queue: FairQueue


@dataclass
class Flight:
    """A check that is being done or waited for; `running`: it can't be taken back any more."""

    task: asyncio.Task[str] = field(init=False)
    n_asking: int = 0
    running: bool = False


class Grammars:
    """No more than `max_waiting` checks wait in either queue. Processes are started when they are first
    needed, run until `close`, and are started anew when one has ended."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._quick = Lane(Checker(QUICK_SECONDS), FairQueue(max_waiting))
        self._slow = Lane(Checker(MOST_SECONDS), FairQueue(max_waiting))
        self._faults: OrderedDict[bytes, str] = OrderedDict()
        self._flights: dict[Key, Flight] = {}

    async def check(self, grammar: str, param: str, owner: str = "") -> None:
        """Raises BadRequest, with `param`, for a grammar that can't be compiled, or Unavailable where that
        can't be found out now."""
        data = grammar.encode()
        if len(data) > MAX_BYTES:
            raise BadRequest(
                f"{param} is a grammar of {len(data)} bytes; {MAX_BYTES} are allowed.", param=param
            )
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest in self._faults:
            self._faults.move_to_end(digest)
            fault = self._faults[digest]
        else:
            fault = await self._joined((owner, digest), grammar)
        if fault:
            raise BadRequest(f"{param} can't be used: {fault}", param=param)

    async def _joined(self, key: Key, grammar: str) -> str:
        """The fault, "" for none, from the one flight of this grammar that its owner has. A flight that all
        have left is taken out of its queue."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = Flight()
            flight.task = asyncio.create_task(self._found(flight, key, grammar))
            flight.task.add_done_callback(lambda task: self._ended(key, task))
        elif flight.n_asking > self.max_waiting:
            raise Overloaded("As many requests are waiting for this grammar as may.")
        flight.n_asking += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.n_asking -= 1
            if not flight.n_asking and not flight.running and not flight.task.done():
                # Nobody may join it from now on.
                self._flights.pop(key, None)
                flight.task.cancel()

    def _ended(self, key: Key, task: asyncio.Task[str]) -> None:
        if (flight := self._flights.get(key)) and flight.task is task:
            del self._flights[key]
        if not task.cancelled():
            # An error is looked at, also where everybody has left.
            task.exception()

    async def _found(self, flight: Flight, key: Key, grammar: str) -> str:
        with suppress(TookTooLong):
            return await self._tried(self._quick, flight, key, grammar)
        if not flight.n_asking:
            self._flights.pop(key, None)
            raise asyncio.CancelledError
        try:
            return await self._tried(self._slow, flight, key, grammar)
        except TookTooLong:
            return self._remembered(key[1], ENDED)

    async def _tried(self, lane: Lane, flight: Flight, key: Key, grammar: str) -> str:
        """Raises TookTooLong. What is found is remembered before another's turn comes."""
        owner, digest = key
        async with lane.queue.turn(owner):
            if digest in self._faults:
                # Another owner's flight was faster.
                return self._faults[digest]
            flight.running = True
            try:
                return self._remembered(digest, await lane.checker.fault(grammar))
            finally:
                flight.running = False

    def _remembered(self, digest: bytes, fault: str) -> str:
        self._faults[digest] = fault
        if len(self._faults) > REMEMBERED:
            self._faults.popitem(last=False)
        return fault

    async def close(self) -> None:
        flights = [flight.task for flight in self._flights.values()]
        for task in flights:
            task.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        await self._quick.checker.close()
        await self._slow.checker.close()
