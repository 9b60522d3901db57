"""Real servers for tests: `headstart serve` as its user would start it, on a free port."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from forkserver import ROOM, started

Json = dict[str, Any]

READY_SECONDS = 60.0
# For servers with the real model: with two threads, tests in parallel take 1.6 times the processor time.
ONE_THREAD = ("--threads", "1")
# Tests of cache files: what the state store keeps need not be read from them.
WITHOUT_STORE = {"HEADSTART_STATE_MEMORY_MB": "0", "HEADSTART_STATE_DISK_MB": "0"}


class RunningServer:
    """A server process. `url` is its address, `http` a client for it; both change with a restart."""

    def __init__(self, cache_dir: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self.cache_dir = cache_dir
        self.flags = flags
        self.env = {**os.environ, **(env or {})}
        self.start()

    def start(self) -> None:
        self.log = self.cache_dir.parent / f"{self.cache_dir.name}.log"
        arguments = ["serve", "--port", "0", "--cache-dir", str(self.cache_dir), *self.flags]
        with self.log.open("wb") as log:
            self.process = started(arguments, log, log, self.env)
        try:
            self.url = self._wait_for_url()
        except BaseException:
            self.process.kill()
            raise
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def _wait_for_url(self) -> str:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if found := re.search(r"listens on (http://\S+)", self.log.read_text()):
                return found[1]
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended:\n{self.log.read_text()}")
            time.sleep(0.02)
        raise AssertionError(f"the server is not ready:\n{self.log.read_text()}")

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.http.close()
        self.process.send_signal(number)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def restart(self) -> None:
        self.stop()
        self.start()

    def workers(self) -> list[psutil.Process]:
        """The models' engines."""
        return self.processes("headstart.engine.worker")

    def processes(self, module: str = "") -> list[psutil.Process]:
        """What the server has started and runs this module; "" for all."""
        found = []
        # Those that are forked are not the server's own children, but those of processes with ROOM.
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                command = process.cmdline()
                if module in command or not (module or ROOM in command):
                    found.append(process)
        return found

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def create(self, name: str, prompt: str, model: str = "toy", **more: Any) -> Json:
        response = self.post(f"/v1/cache/{model}", cache_name=name, prompt=prompt, **more)
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, text: str, model: str = "toy", system: str = "", **more: Any) -> Json:
        """One greedy chat answer; its body."""
        opening = [{"role": "system", "content": system}] if system else []
        response = self.post(
            "/v1/chat/completions",
            model=model,
            messages=[*opening, {"role": "user", "content": text}],
            **{"temperature": 0, "max_tokens": 24, **more},
        )
        assert response.status_code == 200, response.text
        return response.json()

    def files(self) -> list[str]:
        """Names of everything under the cache directory but the index, the lock, what was measured, the
        copies of headers and the state store's blocks."""
        return sorted(
            str(path.relative_to(self.cache_dir))
            for path in self.cache_dir.rglob("*")
            if path.is_file()
            and not path.name.startswith((".lock", "index.sqlite", "tuning.json"))
            and path.suffix not in (".header", ".block")
        )


@contextmanager
def running_server(
    cache_dir: Path, *flags: str, env: dict[str, str] | None = None
) -> Iterator[RunningServer]:
    server = RunningServer(cache_dir, *flags, env=env)
    try:
        yield server
    finally:
        server.http.close()
        if server.process.poll() is None:
            server.stop()


def said(answer: Json) -> str:
    """The text of a chat or text completion."""
    choice = answer["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def events(response: httpx.Response) -> Iterator[Json]:
    """The events of a stream, which must be closed by [DONE]. Dropping the iterator ends the request."""
    assert response.status_code == 200, response.read()
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream ended without [DONE]")


def eventually(is_so: Callable[[], bool], seconds: float = 20) -> None:
    """Waits until it is so, and fails if it never is."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
