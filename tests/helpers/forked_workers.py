"""Workers and prompt processes of a server that was forked: a process of the server forks them too."""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forking

MODULES = ("headstart.engine.worker", "headstart.prompt.process.worker")


class ForkedWorker:
    """The part of asyncio's Process that the server uses."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid, self.status = pid, status
        self.returncode: int | None = None
        self.loop = asyncio.get_running_loop()
        self.ended = self.loop.create_future()
        self.loop.add_reader(status, self._end)

    def _end(self) -> None:
        self.loop.remove_reader(self.status)
        self.returncode = int(os.read(self.status, 16) or -signal.SIGKILL)
        os.close(self.status)
        if not self.ended.done():
            self.ended.set_result(None)

    async def wait(self) -> int:
        await asyncio.shield(self.ended)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.returncode is not None:
            raise ProcessLookupError
        os.kill(self.pid, signal.SIGKILL)


def fork_workers() -> None:
    """Has asyncio fork this process's workers. To be called while it has one thread. Returns once, here."""
    ours, theirs = socket.socketpair()
    if not os.fork():
        ours.close()
        _run(*forking.serve(theirs))
    theirs.close()
    genuine = asyncio.create_subprocess_exec

    async def start(*command: Any, pass_fds: Sequence[int] = (), **more: Any) -> Any:
        if command[:3] != (sys.executable, "-P", "-m") or command[3] not in MODULES:
            return await genuine(*command, pass_fds=pass_fds, **more)
        request = {"command": command, "env": dict(more["env"])}
        return ForkedWorker(*forking.fork(ours, request, list(pass_fds)))

    asyncio.create_subprocess_exec = start  # type: ignore[assignment]


def _run(request: dict[str, Any], handles: list[int]) -> None:
    """Does what `python -P -m MODULE FD ...` does, to its end."""
    command, (channel,) = request["command"], handles
    _, _, _, module, _, *more = command
    os.environ.clear()
    os.environ.update(request["env"])
    del sys.path[0]
    sys.argv = [module, str(channel), *more]
    _be_called(command)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    try:
        importlib.import_module(module).main()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def _be_called(command: Sequence[str]) -> None:
    """Writes the command line where the kernel shows it."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    text = b"\0".join(map(os.fsencode, command))[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)
