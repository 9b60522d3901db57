"""Grammars for the engine that restrict an answer's format. The functions here don't check that a grammar
compiles: `Grammars.check` does, for all of them.

White space in JSON: between any two parts at most one space, or a line break and indentation. A model that
may write more can repeat it forever.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from headstart.errors import BadRequest, Overloaded
from headstart.service.generation.fair_queue import FairQueue
from headstart.service.generation.grammar_checker import ENDED, CheckerProcess, TookTooLong

Schema = dict[str, Any]

WHITESPACE = r"[ ]|\n[ ]{0,24}"
# Replaces a schema's own options ("x-guidance"): they could break these guarantees.
JSON: dict[str, Any] = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    "coerce_one_of": False,
    "lenient": False,
}
OBJECT: Schema = {"type": "object"}
GBNF = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)


def json_grammar(schema: Schema, param: str) -> str:
    """Answers that are JSON with this schema. Raises BadRequest if the schema is not valid JSON."""
    return f'{{"grammars": [{{"json_schema": {_text(schema, param)}}}]}}'


def _text(schema: Schema, param: str) -> str:
    try:
        text = json.dumps({**schema, "x-guidance": JSON}, allow_nan=False, ensure_ascii=False)
        text.encode()
        return text
    except (ValueError, RecursionError):
        raise BadRequest(
            f"{param} has a schema that is no JSON, or is nested too deeply.", param=param
        ) from None


def choice_grammar(choices: list[str]) -> str:
    """Answers that are one of these texts."""
    return lark_grammar("start: " + " | ".join(json.dumps(choice) for choice in choices))


def regex_grammar(regex: str) -> str:
    """Answers that match the whole expression, in the syntax of Rust's `regex`."""
    return LLMatcher.grammar_from_regex(regex)


def lark_grammar(lark: str) -> str:
    """A grammar in llguidance's Lark syntax; answers match `start`."""
    return LLMatcher.grammar_from_lark(lark)


def written_grammar(text: str, param: str) -> str:
    """A grammar in Lark's syntax or in GBNF, which is recognised by `::=`. Raises BadRequest."""
    if not GBNF.search(text):
        return lark_grammar(text)
    try:
        return lark_grammar(gbnf_to_lark(text))
    except Exception as error:
        # llguidance's translator raises whatever its code runs into.
        raise BadRequest(f"{param} is no GBNF grammar: {error}", param=param) from None


MAX_BYTES = 256 << 10
REMEMBERED = 4096
# Processor time: ordinary schemas take some milliseconds.
QUICK_SECONDS = 0.1
MOST_SECONDS = 2.0

Key = tuple[str, bytes]


@dataclass
class Lane:
    """One process and its queue."""

    checker: CheckerProcess
    queue: FairQueue


@dataclass
class Flight:
    """A check that is running or waiting. `running`: it can't be cancelled any more."""

    task: asyncio.Task[str] = field(init=False)
    n_asking: int = 0
    running: bool = False


class GrammarChecks:
    """Checks grammars in two processes, first with a short time limit. At most `max_waiting` checks wait in
    each queue. Processes start when first needed, run until `close`, and are restarted if they end."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._quick = Lane(CheckerProcess(QUICK_SECONDS), FairQueue(max_waiting))
        self._slow = Lane(CheckerProcess(MOST_SECONDS), FairQueue(max_waiting))
        self._faults: OrderedDict[bytes, str] = OrderedDict()
        self._flights: dict[Key, Flight] = {}

    async def check(self, grammar: str, param: str, owner: str = "") -> None:
        """Raises BadRequest, with `param`, for a grammar that can't be compiled, or Unavailable if it can't
        be checked now."""
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
        """The fault, "" for none, from the owner's only check of this grammar. A check that all requests have
        left is taken out of its queue."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = Flight()
            flight.task = asyncio.create_task(self._found(flight, key, grammar))
            flight.task.add_done_callback(lambda task: self._ended(key, task))
        elif flight.n_asking > self.max_waiting:
            raise Overloaded("The maximum number of requests is waiting for this grammar.")
        flight.n_asking += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.n_asking -= 1
            if not flight.n_asking and not flight.running and not flight.task.done():
                # No request may join it from now on.
                self._flights.pop(key, None)
                flight.task.cancel()

    def _ended(self, key: Key, task: asyncio.Task[str]) -> None:
        if (flight := self._flights.get(key)) and flight.task is task:
            del self._flights[key]
        if not task.cancelled():
            # Retrieves the error, also if all requests have left.
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
        """Raises TookTooLong. The finding is stored before another owner's turn comes."""
        owner, digest = key
        async with lane.queue.turn(owner):
            if digest in self._faults:
                # Another owner's check was faster.
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
