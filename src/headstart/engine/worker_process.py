"""The server's side of a worker process: starts it, reads its messages, ends it, and explains its exit."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import suppress

from headstart.channel import Frames
from headstart.engine.kinds import engine_kind
from headstart.machine import module_command, signal_name
from headstart.protocol import WorkerMessage

READ_BYTES = 1 << 20
SPIN_COUNT = "1000"
HUGE_PAGES = "glibc.malloc.hugetlb=1"
# The time that a worker has, once its socket is closed, to write what it holds and end.
END_SECONDS = 10.0
CRASHES = ("SIGILL", "SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE")


async def started(path: str) -> tuple[asyncio.subprocess.Process, socket.socket]:
    """Starts a worker process for the model at `path`; also returns the server's end of its socket. Raises
    OSError."""
    ours, theirs = socket.socketpair()
    try:
        process = await asyncio.create_subprocess_exec(
            *module_command("headstart.engine.worker", str(theirs.fileno()), path),
            pass_fds=[theirs.fileno()],
            stdin=asyncio.subprocess.DEVNULL,
            env=worker_environment(),
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return process, ours


async def connected(ours: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The socket as streams, which then own it. Raises OSError."""
    try:
        return await asyncio.open_connection(sock=ours)
    except BaseException:
        ours.close()
        raise


async def messages(reader: asyncio.StreamReader) -> AsyncIterator[WorkerMessage]:
    """The worker's messages until its end. Raises Garbled."""
    frames: Frames[WorkerMessage] = Frames(WorkerMessage)
    # A reset, or a broken pipe if a send noticed the end: the worker has ended in any case.
    with suppress(OSError):
        while data := await reader.read(READ_BYTES):
            for message in frames.feed(data):
                yield message


async def ended(process: asyncio.subprocess.Process) -> int:
    """Waits for the worker's end and returns its exit status. The worker ends by itself when its socket
    closes, after its current step, when it has written what it holds; it is killed after END_SECONDS, or at
    once if the caller is cancelled."""
    try:
        return await asyncio.wait_for(asyncio.shield(process.wait()), END_SECONDS)
    except TimeoutError:
        kill(process)
        return await process.wait()
    except asyncio.CancelledError:
        kill(process)
        raise


def kill(process: asyncio.subprocess.Process) -> None:
    """Kills the process if it is still running."""
    with suppress(ProcessLookupError):
        process.kill()


def worker_environment() -> dict[str, str]:
    """The environment of workers; variables set by the user are kept. OpenMP's threads wait for each other by
    spinning, by default so long that a second busy process on the same CPUs makes decoding tens of times
    slower. Huge pages make it quick to clear a KV cache at the start. Figures for both:
    docs/architecture.md."""
    ours = {"GLIBC_TUNABLES": HUGE_PAGES}
    if "OMP_WAIT_POLICY" not in os.environ:
        ours["GOMP_SPINCOUNT"] = SPIN_COUNT
    return ours | os.environ


def explain_exit(code: int, path: str) -> str:
    """Explains in words why the worker of the model at `path` ended."""
    if code >= 0:
        return f"the worker process exited with status {code}"
    name = signal_name(-code)
    text = f"the worker process was ended by {name}"
    return f"{text}. {engine_kind(path).crash_hint}" if name in CRASHES else text
