"""A prompt process and the socket to it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import suppress

import msgspec

from headstart.channel import HEADER
from headstart.machine import module_command, signal_name
from headstart.prompt.process.protocol import Reply

# Larger than any reply of a prompt process.
MOST_BYTES = 256 << 20
END_SECONDS = 5.0
# Prevents llama.cpp from starting a debugger when it fails.
ENVIRONMENT = {"GGML_NO_BACKTRACE": "1", "TOKENIZERS_PARALLELISM": "false"}
# Signals that end a process from outside, whatever it was doing.
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)


class LinkEnded(Exception):
    """A process has ended or was ended; the message says why. `may_be_the_requests`: the request may be the
    cause."""

    def __init__(self, reason: str, *, may_be_the_requests: bool = True) -> None:
        super().__init__(reason)
        self.may_be_the_requests = may_be_the_requests


class Link:
    """One process and the socket to it. `request` is used by one task at a time."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.process, self.reader, self.writer = process, reader, writer
        self.decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)

    @classmethod
    async def start(cls) -> Link:
        """Starts a process. Raises LinkEnded if that fails."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                *module_command("headstart.prompt.process.worker", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                env=os.environ | ENVIRONMENT,
            )
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError):
                raise LinkEnded(f"it can't be started: {error}", may_be_the_requests=False) from error
            raise
        finally:
            theirs.close()
        try:
            return cls(process, *await asyncio.open_connection(sock=ours))
        except BaseException:
            # Its process ends with the socket.
            ours.close()
            raise

    @property
    def has_ended(self) -> bool:
        return self.reader.at_eof() or self.writer.is_closing() or self.process.returncode is not None

    async def request(self, data: bytes, seconds: float) -> Reply:
        """The reply to a request. Raises LinkEnded, after which the process no longer runs."""
        try:
            async with asyncio.timeout(seconds):
                self.writer.write(data)
                await self.writer.drain()
                (size,) = HEADER.unpack(await self.reader.readexactly(HEADER.size))
                if size > MOST_BYTES:
                    raise msgspec.DecodeError(f"a reply of {size} bytes")
                return self.decoder.decode(await self.reader.readexactly(size))
        except TimeoutError as error:
            await self.close()
            raise LinkEnded(f"it had not answered after {seconds:g} seconds") from error
        except msgspec.DecodeError as error:
            await self.close()
            raise LinkEnded(f"it answered with nonsense: {error}") from error
        except (asyncio.IncompleteReadError, OSError, RuntimeError) as error:
            # uvloop raises RuntimeError for a socket that it has closed.
            raise _explained(await self._code()) from error

    async def _code(self) -> int:
        with suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(self.process.wait()), END_SECONDS)
        await self.close()
        return await self.process.wait()

    async def close(self) -> None:
        """Ends the process; may be called again."""
        self.writer.close()
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        with suppress(OSError):
            await self.writer.wait_closed()


def _explained(code: int) -> LinkEnded:
    if code >= 0:
        return LinkEnded(f"it ended with status {code}")
    name = signal_name(-code)
    if -code in FROM_OUTSIDE:
        return LinkEnded(f"it was ended by {name}", may_be_the_requests=False)
    if -code == signal.SIGVTALRM:
        return LinkEnded("it took too much of the processor's time")
    return LinkEnded(f"it crashed ({name}); the log has its last words, if any")
