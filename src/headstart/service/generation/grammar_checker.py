"""The server's side of a process that compiles grammars (`headstart.engine.grammar_check`)."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from contextlib import suppress

from headstart.errors import Unavailable

log = logging.getLogger(__name__)

TIME = signal.SIGPROF
# What a compiler without memory or stack ends by.
CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGTRAP)
ENDED = "compiling it takes too much time or memory"
TRIES = 3


class TookTooLong(Exception):
    """A check has used up its processor time."""


class Checker:
    """Checks one grammar at a time, each in `seconds` of processor time. Has a process from the first grammar
    on, until `close`; one that ended is started anew."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._process: asyncio.subprocess.Process | None = None

    async def fault(self, grammar: str) -> str:
        """Why the grammar can't be compiled; "" where it can. Raises TookTooLong, or Unavailable where the
        check is ended again and again by something else than what it does."""
        question = json.dumps([grammar, self.seconds]).encode() + b"\n"
        for _ in range(TRIES):
            answer = await self._ask(question)
            if isinstance(answer, str):
                return answer
            if answer == TIME:
                raise TookTooLong
            if answer in CRASHES:
                return ENDED
            if answer == signal.SIGALRM:
                raise Unavailable("The machine is too busy to check the grammar.")
        raise Unavailable("The process that checks grammars was ended from outside.")

    async def _ask(self, question: bytes) -> str | int | None:
        """The fault, or the signal that ended the check; None: the process itself has ended."""
        answer = b""
        try:
            process = self._process = self._process or await _started()
        except OSError as error:
            raise Unavailable(f"No process can be started to check the grammar: {error.strerror}.") from error
        assert process.stdin
        assert process.stdout
        try:
            # uvloop's transports raise RuntimeError once they are closed.
            with suppress(ConnectionError, RuntimeError):
                process.stdin.write(question)
                await process.stdin.drain()
                answer = await process.stdout.readline()
        finally:
            if not answer.endswith(b"\n"):
                await self.close()
        if not answer.endswith(b"\n"):
            log.warning("the process that checks grammars ended and is started anew")
            return None
        found: str | int = json.loads(answer)
        return found

    async def close(self) -> None:
        process, self._process = self._process, None
        if process:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _started() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        # -P: what lies in the current folder is no part of the program.
        *(sys.executable, "-P", "-m", "headstart.engine.grammar_check"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # It forks, so it is to have no threads; numpy's would be of no use.
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
