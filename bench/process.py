"""A server process that was started for the benchmark, and what it takes of the machine."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import psutil

from bench.client import BenchFailed, Connection

READY_SECONDS = 180
STOP_SECONDS = 15


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class ServerProcess:
    """Running when made, ready to answer unless BenchFailed is raised. `start_ms`: until /ready said so;
    `shown`: the command without folders."""

    def __init__(self, command: Sequence[str], port: int, log: Path, env: Mapping[str, str]) -> None:
        self.port = port
        self.log = log
        self.shown = " ".join(Path(part).name for part in command)
        self.started = time.perf_counter()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **env}
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        self.start_ms = 1000 * (time.perf_counter() - self.started)

    def stop(self) -> None:
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self._process.kill()
        self._process.wait()

    def memory_mb(self) -> dict[str, float]:
        """Of the process and its children, in millions of bytes: all resident pages, and where the system
        tells it (pss_mb) those that several processes share only once."""
        used = [process.memory_full_info() for process in self._tree()]
        sizes = {"rss_mb": sum(item.rss for item in used)}
        if hasattr(used[0], "pss"):
            sizes["pss_mb"] = sum(item.pss for item in used)
        return {name: size / 1e6 for name, size in sizes.items()}

    def cpu_seconds(self) -> float:
        times = [process.cpu_times() for process in self._tree()]
        return float(sum(item.user + item.system for item in times))

    def _tree(self) -> list[psutil.Process]:
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children(recursive=True)]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise BenchFailed(f"a server did not start:\n{self.log.read_text(errors='replace')[-2000:]}")
            with suppress(OSError, HTTPException, BenchFailed), Connection(self.port) as connection:
                connection.call("GET", "/ready")
                return
            time.sleep(0.01)
        raise BenchFailed(f"a server was not ready after {READY_SECONDS} seconds, see {self.log}")
