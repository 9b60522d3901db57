"""A server for the duration of a block of code."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from headstart.cli.client import RequestFailed
from headstart.machine import module_command

READY_SECONDS = 120
STOP_SECONDS = 10


@contextmanager
def own_server(*flags: str) -> Iterator[str]:
    """The address of a server on a free local port; its cache directory is empty unless `flags` name another.
    However the block is left, short of SIGKILL, the server has ended and its own files are gone. Raises
    RequestFailed when it can't start. Takes over SIGTERM and SIGHUP, so it is for the main thread only."""
    with _signals_raised(), TemporaryDirectory(prefix="headstart-") as directory:
        log = Path(directory) / "server.log"
        place = ["--host", "127.0.0.1", "--port", "0", "--cache-dir", str(Path(directory) / "cache")]
        with log.open("wb") as output:
            process = subprocess.Popen(
                module_command("headstart", "serve", *place, *flags),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            yield _address(process, log)
        finally:
            _stop(process)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        output = log.read_text(errors="replace")
        if found := re.search(r"listens on (http://\S+)", output):
            return found[1]
        if ended:
            raise RequestFailed(f"The server did not start:\n{output.strip()}")
        time.sleep(0.05)
    raise RequestFailed(f"The server was not ready after {READY_SECONDS} seconds.")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    finally:
        process.kill()
        process.wait()


@contextmanager
def _signals_raised() -> Iterator[None]:
    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
