"""The server tells a worker what its state store may hold and must forget, and lets it write at its end."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headstart.engine import client as client_module
from headstart.engine import launcher, submitted_request, worker_process
from headstart.engine.client import EngineClient
from headstart.errors import EngineDied, ModelLoading
from headstart.protocol import EngineSettings, StateSettings, StoreReport, Submit

# A worker that writes down what it is told and answers nothing but Forget. At its end it takes its time.
WORKER = """
import socket, sys, time
from pathlib import Path
from headstart.channel import Frames, frame
from headstart.protocol import *

channel, told, mode = socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
frames = Frames(Command)
info = ModelInfo(n_ctx=64, slots=1, can_cut=True, engine="toy", settings={})
while data := channel.recv(1 << 20):
    for command in frames.feed(data):
        with told.open("a") as file:
            print(repr(command), file=file)
        if isinstance(command, Begin):
            if mode == "late":
                time.sleep(0.3)
            channel.sendall(frame(Ready(info)))
            channel.sendall(frame(StoreReport(memory_bytes=7, disk_bytes=9, evictions=2, park_ms=1.5)))
        if isinstance(command, Forget):
            if mode == "dies":
                sys.exit(3)
            if mode != "silent":
                channel.sendall(frame(Step([Forgotten(command.id, 5)])))
if mode == "hangs":
    time.sleep(600)
time.sleep(0.5)
with told.open("a") as file:
    print("written", file=file)
"""
STATES = StateSettings(directory="d", weights="w", memory_bytes=100, disk_bytes=200, days=7.0)


@asynccontextmanager
async def _client(told: Path, monkeypatch: pytest.MonkeyPatch, mode: str = "") -> AsyncIterator[EngineClient]:
    processes = []

    async def started(_: str) -> tuple[asyncio.subprocess.Process, socket.socket]:
        ours, theirs = socket.socketpair()
        try:
            command = (sys.executable, "-c", WORKER, str(theirs.fileno()), str(told), mode)
            process = await asyncio.create_subprocess_exec(*command, pass_fds=[theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        processes.append(process)
        return process, ours

    monkeypatch.setattr(launcher, "started", started)
    client = EngineClient("toy", EngineSettings("toy:", 1, 0, states=STATES), 64)
    client.start()
    try:
        yield client
    finally:
        await client.close()
        async with asyncio.timeout(20):
            await asyncio.gather(*(process.wait() for process in processes))


def _told(told: Path) -> list[str]:
    return told.read_text().splitlines() if told.exists() else []


async def _eventually(is_so: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.01)


async def _ready(client: EngineClient) -> None:
    """Returns when the worker has said all that it says by itself."""
    await client.wait_ready()
    await _eventually(lambda: client.store.memory_bytes)


async def test_a_closed_worker_is_waited_for_while_it_writes_and_its_requests_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    async with _client(told, monkeypatch) as client:
        await _ready(client)
        with client.submit(Submit(0, [1], max_tokens=4)) as running:
            closing = asyncio.create_task(client.close())
            with pytest.raises(EngineDied, match="stopped"):
                async for _ in running:
                    pass
            assert "written" not in _told(told)
        await closing
        assert _told(told)[-1] == "written"


async def test_a_worker_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "END_SECONDS", 0.1)
    async with _client(tmp_path / "told", monkeypatch, "hangs") as client:
        await _ready(client)
        async with asyncio.timeout(20):
            await client.close()


async def test_a_close_that_is_given_up_kills_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the event loop ends, after a second signal."""
    told = tmp_path / "told"
    async with _client(told, monkeypatch, "hangs") as client:
        await _ready(client)
        supervisor = client._supervisor
        assert supervisor
        closing = asyncio.create_task(client.close())
        await asyncio.sleep(0.1)
        assert not closing.done()
        supervisor.cancel()
        async with asyncio.timeout(20):
            await closing
        assert "written" not in _told(told)


async def test_forgetting_is_answered_with_the_number_of_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    async with _client(told, monkeypatch) as client:
        with pytest.raises(ModelLoading):
            await client.forget("key")
        await _ready(client)
        counts = await asyncio.gather(client.forget("key", [1, 2], [[1]]), client.forget(None))
        assert counts == [5, 5]
        first, second = (line for line in _told(told) if "Forget" in line)
        assert "owner='key', tokens=[1, 2], kept=[[1]]" in first
        assert "owner=None, tokens=None, kept=[]" in second


@pytest.mark.parametrize("mode", ["dies", "silent"])
async def test_a_worker_that_does_not_answer_a_forget_is_an_error(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "silent":
        monkeypatch.setattr(submitted_request, "FORGET_SECONDS", 0.05)
    async with _client(tmp_path / "told", monkeypatch, mode) as client:
        await _ready(client)
        with pytest.raises(EngineDied):
            await client.forget("key", [1])
        await _eventually(lambda: client.state == "ready")


async def test_reports_tell_the_content_of_the_running_worker_and_the_counts_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "RESTART_SECONDS", (0.0,) * 4)
    reports: list[StoreReport] = []
    async with _client(tmp_path / "told", monkeypatch, "dies") as client:
        client.on_store = lambda: reports.append(client.store)
        await _eventually(lambda: reports)
        assert reports[0] == StoreReport(memory_bytes=7, disk_bytes=9, evictions=2, park_ms=1.5)
        with pytest.raises(EngineDied):
            await client.forget("")
        await _eventually(lambda: len(reports) == 2)
        assert reports[1] == StoreReport(memory_bytes=7, disk_bytes=9, evictions=4, park_ms=3.0)
        await client.close()
        assert client.store == StoreReport(evictions=4, park_ms=3.0)


async def test_limits_reach_a_worker_at_once_or_when_it_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    async with _client(told, monkeypatch, "late") as client:
        await _eventually(lambda: _told(told))
        client.set_state_limits(50, 60)
        await _ready(client)
        client.set_state_limits(50, 60)
        client.set_state_limits(70, 80)
        assert await client.forget("") == 5
        begin, *others = _told(told)
        assert repr(STATES) in begin
        assert others[:-1] == [
            "SetStateLimits(memory_bytes=50, disk_bytes=60)",
            "SetStateLimits(memory_bytes=70, disk_bytes=80)",
        ]
        assert client.settings.states == msgspec.structs.replace(STATES, memory_bytes=70, disk_bytes=80)
