"""The server's side of a process that compiles grammars (`headstart.engine.grammar_check`)."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from contextlib import suppress

from headstart.errors import Unavailable
from headstart.machine import module_command

log = logging.getLogger(__name__)

TIME = signal.SIGPROF
# Signals that end a compiler which runs out of memory or stack.
CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGTRAP)
ENDED = "compiling it takes too much time or memory"
TRIES = 3


class TookTooLong(Exception):
    """A check has used all its processor time."""


class CheckerProcess:
    """Checks one grammar at a time, each within `seconds` of processor time. The process starts with the
    first grammar and runs until `close`; if it ends, it is restarted."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._process: asyncio.subprocess.Process | None = None

    async def fault(self, grammar: str) -> str:
        """Why the grammar can't be compiled; "" if it can. Raises TookTooLong, or Unavailable if something
        other than the check itself ends it repeatedly."""
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
        """The fault, or the signal that ended the check; None if the process itself has ended."""
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
            log.warning("the process that checks grammars ended and is restarted")
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
        *module_command("headstart.engine.grammar_check"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # The process forks, so it must have no threads; those of numpy are not needed.
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
