"""Starts `headstart` processes without their imports: a process that has imported them forks at each start.

Most of a start is imports, the same each time; workers and prompt processes of these servers are forked
likewise. Where there is no fork server (not on Linux, or with HEADSTART_FORKSERVER=0), processes start as
usual. Workers of services within the tests' own process always do.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import forked_workers
import forking

WANTED = sys.platform == "linux" and os.environ.get("HEADSTART_FORKSERVER") != "0"
PRELOADED = (
    "headstart.cli.main",
    "headstart.cli.serve",
    "uvicorn.protocols.http.httptools_impl",
    "uvicorn.loops.uvloop",
    "uvloop",
    "headstart.engine.toy",
    "llama_cpp",
    *forked_workers.MODULES,
)
# Makes room in the command lines of forked processes for those of workers.
ROOM = "." * 400
# A process inherits them as it would from us.
LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)
# Threads start servers too.
TURN = threading.Lock()


class Process(Protocol):
    """The part of subprocess.Popen that tests use."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


def started(arguments: Sequence[str], output: IO[Any], errors: IO[Any], env: Mapping[str, str]) -> Process:
    """`headstart ARGUMENTS`, with two files for what it prints."""
    if WANTED:
        with TURN:
            return _forkserver().started(arguments, output, errors, env)
    command = [sys.executable, "-m", "headstart", *arguments]
    return subprocess.Popen(command, stdout=output, stderr=errors, env=dict(env))


def headstart(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`headstart ARGUMENTS` to its end."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = started(arguments, output, errors, os.environ | env)
        try:
            code = process.wait(60)
        finally:
            process.kill()
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(arguments, code, output.read(), errors.read())


class ForkedProcess:
    """A process that isn't our child: its parent writes its exit status to the pipe `status`."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.status = status
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            ready, _, _ = select.select([self.status], [], [], timeout)
            if not ready:
                raise subprocess.TimeoutExpired("headstart", timeout or 0)
            self.returncode = int(os.read(self.status, 16) or -signal.SIGKILL)
            os.close(self.status)
        return self.returncode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Ends with the process that made it, by the end of the socket."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, str(Path(__file__)), str(theirs.fileno()), ROOM]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)

    def started(
        self, arguments: Sequence[str], output: IO[Any], errors: IO[Any], env: Mapping[str, str]
    ) -> ForkedProcess:
        request = {
            "arguments": list(arguments),
            "env": dict(env),
            "directory": str(Path.cwd()),
            "limits": [resource.getrlimit(limit) for limit in LIMITS],
        }
        return ForkedProcess(*forking.fork(self.channel, request, [output.fileno(), errors.fileno()]))


@functools.cache
def _forkserver() -> ForkServer:
    return ForkServer()


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    request, handles = forking.serve(channel)
    for stream, handle in enumerate(handles, start=1):
        os.dup2(handle, stream)
        os.close(handle)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["directory"])
    sys.path[0] = request["directory"]
    for limit, values in zip(LIMITS, request["limits"], strict=True):
        resource.setrlimit(limit, tuple(values))
    if "serve" in request["arguments"]:
        forked_workers.fork_workers()
    sys.argv = ["headstart", *request["arguments"]]
    runpy.run_module("headstart", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
