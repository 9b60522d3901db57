"""Whether a grammar can be used, as a process beside the server finds out.

To use it: make the grammar with `headstart.service.structure` (`json_grammar`, `regex_grammar`,
`lark_grammar`), then

    await service.grammars.check(grammar, param="tools")

which raises BadRequest with the compiler's reason and else returns nothing; the grammar then goes to the
engine as `Sampling.grammar`. What was found is remembered, so checking a grammar again costs nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections import OrderedDict
from contextlib import suppress

from headstart.errors import BadRequest

MAX_BYTES = 256 << 10
REMEMBERED = 4096
ENDED = "compiling it takes too much time or memory"


class Grammars:
    """Has a process of its own from the first grammar on, until `close`; one that ended is started anew."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._one_at_a_time = asyncio.Lock()
        self._faults: OrderedDict[bytes, str] = OrderedDict()

    async def check(self, grammar: str, param: str) -> None:
        """Raises BadRequest, with `param`, for a grammar that can't be compiled."""
        data = grammar.encode()
        if len(data) > MAX_BYTES:
            raise BadRequest(
                f"{param} is a grammar of {len(data)} bytes; {MAX_BYTES} are allowed.", param=param
            )
        key = hashlib.blake2b(data, digest_size=16).digest()
        if key not in self._faults:
            self._faults[key] = await self._ask(grammar)
        self._faults.move_to_end(key)
        if len(self._faults) > REMEMBERED:
            self._faults.popitem(last=False)
        if fault := self._faults[key]:
            raise BadRequest(f"{param} can't be used: {fault}", param=param)

    async def _ask(self, grammar: str) -> str:
        async with self._one_at_a_time:
            process = self._process = self._process or await _started()
            assert process.stdin
            assert process.stdout
            answer = b""
            try:
                with suppress(ConnectionError):
                    process.stdin.write(json.dumps(grammar).encode() + b"\n")
                    await process.stdin.drain()
                    answer = await process.stdout.readline()
            finally:
                # Also where the client has gone: the answer is no one else's.
                if not answer.endswith(b"\n"):
                    self._process = None
                    if not process.stdout.at_eof():
                        process.kill()
                    await process.wait()
        return str(json.loads(answer)) if answer else ENDED

    async def close(self) -> None:
        process, self._process = self._process, None
        if process:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _started() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        # -P: what lies in the current folder is no part of the program.
        *(sys.executable, "-P", "-m", "headstart.engine.checking"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
