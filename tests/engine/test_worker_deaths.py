"""Whatever becomes of a worker, its requests are told, their places in the queue are free again, and a model
is never left as one that is being loaded."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest
import uvloop

from conftest import Report, StartServer
from headstart.api.sse import EventStream, start_events
from headstart.channel import HEADER, MOST_BYTES, frame
from headstart.config.settings import load_settings
from headstart.engine import client as module
from headstart.engine import launcher, worker_process
from headstart.engine.client import EngineClient
from headstart.errors import BadRequest, EngineDied, ModelNotFound, StartupError, Unavailable
from headstart.prompt.process import protocol
from headstart.prompt.process.client import PromptClient, facts_of
from headstart.protocol import EngineSettings, ModelInfo, Ready, Step, Submit
from headstart.service.origins.declared import Declared
from headstart.service.service import Service
from own_workers import own_workers
from servers import RunningServer, eventually
from sweeps import rounds

PROMPT = "You keep the lighthouse. " * 8
KILLS = 200
SLOTS, WAITING = 2, 6


def _ask(server: RunningServer, http: httpx.Client, number: int) -> httpx.Response:
    said = [{"role": "user", "content": "Ships? " * (1 if number % 3 else 120)}]
    body: dict[str, Any] = {"model": "toy", "messages": said, "max_tokens": 12}
    match number % 5:
        case 0:
            return http.post(
                "/v1/cache/toy", json={"cache_name": f"c{number % 7}", "prompt": PROMPT + "!" * number}
            )
        case 1:
            return http.post("/v1/chat/completions", json=body | {"stream": True})
        case 2:
            return http.post("/v1/chat/completions", json=body | {"save_as": f"s{number % 7}"})
        case 3:
            return http.post("/v1/embeddings", json={"model": "toy", "input": ["one", "two " * 40]})
        case _:
            return http.post("/v1/chat/completions", json=body)


def _outcome(response: httpx.Response) -> str:
    """The code of its error, be it the answer or the end of a stream; "" for none."""
    if response.status_code != 200:
        return str(response.json()["error"]["code"])
    if "event-stream" in response.headers["content-type"]:
        events = [
            msgspec.json.decode(line[6:]) for line in response.text.splitlines() if line[:7] == "data: {"
        ]
        return next((str(event["error"]["code"]) for event in events if "error" in event), "")
    return ""


class Load:
    """Clients that ask without end, some of whom leave in the middle."""

    def __init__(self, server: RunningServer, clients: int = 4) -> None:
        self.server = server
        self.over = threading.Event()
        self.outcomes: Counter[tuple[int, str]] = Counter()
        self.pool = ThreadPoolExecutor(clients)
        self.asking = [self.pool.submit(self._ask_on, seed) for seed in range(clients)]

    def _ask_on(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self.server.url, timeout=60) as http:
            while not self.over.is_set():
                response = _ask(self.server, http, rng.randrange(1000))
                self.outcomes[response.status_code, _outcome(response)] += 1
                if response.status_code == 503:
                    time.sleep(0.02)
                elif rng.random() < 0.2:
                    self._leave(http)

    def _leave(self, http: httpx.Client) -> None:
        body = {"model": "toy", "prompt": "Go on", "max_tokens": 500, "stream": True}
        with http.stream("POST", "/v1/completions", json=body):
            pass

    def end(self) -> None:
        self.over.set()
        for asking in self.asking:
            asking.result()
        self.pool.shutdown()


def _handles(server: RunningServer) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def _is_idle(server: RunningServer) -> bool:
    return server.post("/v1/models/unload", model="toy").status_code == 200


@pytest.mark.sweep
@pytest.mark.slow
def test_no_kill_of_a_worker_costs_a_place_or_makes_a_fault(
    start_server: StartServer, report: Report
) -> None:
    env = {"HEADSTART_MAX_WAITING": str(WAITING)}
    server = start_server("--model", "toy=toy:ms_per_token=0.2", "--slots", str(SLOTS), env=env)
    eventually(lambda: _is_idle(server))
    server.chat("Hello?")
    before = _handles(server)
    load = Load(server)
    rng = random.Random(1)
    kills = 0
    for number in range(rounds(KILLS)):
        eventually(lambda: bool(server.workers()))
        # Every third one is killed while it is being loaded.
        if number % 3:
            eventually(lambda: server.http.get("/ready").status_code == 200, 60)
            time.sleep(rng.uniform(0, 0.3))
        for worker in server.workers():
            worker.send_signal(rng.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGRTMIN + 1]))
            kills += 1
    load.end()
    report(f"{kills} kills; {dict(load.outcomes)}")
    # Of two clients that keep different things under one name, the second is told so.
    allowed = {(200, ""), (200, "engine_died"), (409, "cache_conflict")}
    allowed |= {(503, code) for code in ("engine_died", "model_loading", "unavailable", "overloaded")}
    assert load.outcomes.keys() <= allowed, load.outcomes
    eventually(lambda: _is_idle(server), 60)
    _fill(server)
    eventually(lambda: _is_idle(server))
    server.chat("Hello?")
    eventually(lambda: _handles(server) <= before + 2)


def _fill(server: RunningServer) -> None:
    """As many requests as may run and wait, at once: all are answered."""
    server.chat("Hello?")
    body = {"model": "toy", "prompt": "Go on", "max_tokens": 200, "ignore_eos": True}
    with ThreadPoolExecutor(SLOTS + WAITING) as pool:
        url = f"{server.url}/v1/completions"
        asked = [pool.submit(httpx.post, url, json=body, timeout=60) for _ in range(SLOTS + WAITING)]
        assert [each.result().status_code for each in asked] == [200] * (SLOTS + WAITING)


def test_a_model_whose_worker_died_is_unloaded_when_it_is_idle(start_server: StartServer) -> None:
    env = {"HEADSTART_IDLE_UNLOAD_SECONDS": "0.5"}
    server = start_server("--model", "toy=toy:ms_per_token=5,eos=0", env=env)
    body = {"model": "toy", "prompt": "Go on", "max_tokens": 1000, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.workers()[0].kill()
        assert any('"engine_died"' in line for line in lines)
    eventually(lambda: server.http.get("/v1/models/loaded").json()["data"] == [])


# The client of a worker

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]
REQUEST = Submit(0, [1] * 10, max_tokens=3)


def _with_worker(work: Callable[[EngineClient], Any], loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def run() -> None:
        client = EngineClient("toy", EngineSettings("toy:", 4, 0), 64)
        client.start()
        await client.wait_ready()
        try:
            await work(client)
        finally:
            await client.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run())


def _kill_unnoticed(number: int = signal.SIGKILL) -> None:
    """The event loop doesn't run meanwhile, so it can't have seen it."""
    workers = own_workers()
    for worker in workers:
        worker.send_signal(number)
    for worker in workers:
        # A thread of asyncio's may be the first to wait for it.
        with suppress(psutil.NoSuchProcess):
            while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGRTMIN + 1])
def test_requests_to_a_worker_that_has_just_died_get_engine_died_and_leave_no_trace(
    loop: Callable[[], asyncio.AbstractEventLoop], number: int
) -> None:
    async def ask(client: EngineClient) -> None:
        with client.submit(REQUEST) as running:
            async for _ in running:
                pass

    async def work(client: EngineClient) -> None:
        _kill_unnoticed(number)
        asked = [asyncio.create_task(ask(client)) for _ in range(5)]
        ends = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(end) for end in ends} == {EngineDied}
        assert client.n_requests == 0
        # It comes back by itself, and takes requests again.
        while client.state != "ready":
            assert client.state == "loading"
            await asyncio.sleep(0.01)
        await ask(client)

    _with_worker(work, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_what_is_sent_to_a_connection_that_is_closing_takes_no_place(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def work(client: EngineClient) -> None:
        with client.submit(REQUEST) as running:
            assert client._writer
            client._writer.transport.abort()
            for _ in range(3):
                with pytest.raises(EngineDied):
                    client.submit(REQUEST)
            running.cancel()
            assert client.n_requests == 1
        assert client.n_requests == 0

    _with_worker(work, loop)


@pytest.mark.parametrize(
    "unsendable",
    [{"tokens": [1 << 64]}, {"tokens": [-(1 << 63) - 1]}, {"tokens": [1], "text": "\ud800"}],
)
def test_what_can_not_be_sent_is_refused_and_takes_no_place(unsendable: dict[str, Any]) -> None:
    async def work(client: EngineClient) -> None:
        with pytest.raises(BadRequest, match="can't be sent"):
            client.submit(Submit(0, **unsendable))
        assert client.n_requests == 0
        with client.submit(REQUEST) as running:
            assert [type(event).__name__ async for event in running][-1] == "Finished"

    _with_worker(work, asyncio.new_event_loop)


def test_a_large_frame_of_which_the_worker_read_a_part_is_not_waited_for() -> None:
    async def work(client: EngineClient) -> None:
        (worker,) = own_workers()
        worker.suspend()
        asked = Submit(0, [1] * 2_000_000, max_tokens=1)
        with client.submit(asked) as one, client.submit(asked) as other:
            await asyncio.sleep(0.05)
            worker.kill()
            for running in (one, other):
                with pytest.raises(EngineDied):
                    async for _ in running:
                        pass
        assert client.n_requests == 0

    _with_worker(work, uvloop.new_event_loop)


INFO = ModelInfo(n_ctx=64, slots=1, can_cut=True, engine="toy", settings={})
RUBBISH = {
    "no message": HEADER.pack(3) + b"\xc1\xc1\xc1",
    "another type": HEADER.pack(len(body := msgspec.msgpack.encode({"type": "Ready"}))) + body,
    "no map": HEADER.pack(1) + b"\x01",
    "deep": HEADER.pack(60_000) + b"\x91" * 60_000,
    "no text": HEADER.pack(len(bad := b"\x81\xa4type\xa5\xff\xff\xff\xff\xff")) + bad,
    "too long": struct.pack("<I", MOST_BYTES + 1),
    "cut": HEADER.pack(100) + b"half",
    "nothing": b"",
}


def _says(data: bytes, *, stays: bool = False) -> Callable[..., Any]:
    """A worker that sends this, and then ends or `stays`."""

    async def started(_: str) -> tuple[asyncio.subprocess.Process, socket.socket]:
        ours, theirs = socket.socketpair()
        theirs.sendall(data)
        wait = "import time; time.sleep(600)" if stays else ""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", wait, pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL
        )
        theirs.close()
        return process, ours

    return started


@pytest.mark.parametrize("what", RUBBISH)
@pytest.mark.parametrize("ready", [False, True])
async def test_a_worker_that_sends_rubbish_is_ended_and_never_counts_as_loading_for_ever(
    what: str, ready: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = frame(Ready(INFO)) + frame(Step([])) if ready else b""
    stays = what not in ("cut", "nothing")
    genuine = worker_process.started
    monkeypatch.setattr(launcher, "started", _says(first + RUBBISH[what], stays=stays))
    client = EngineClient("toy", EngineSettings("toy:", 4, 0), 64)
    client.start()
    if not ready:
        with pytest.raises(StartupError):
            await client.wait_ready()
        assert client.state == "failed"
        with pytest.raises(Unavailable):
            client.submit(REQUEST)
    else:
        await client.wait_ready()
        monkeypatch.setattr(launcher, "started", genuine)
        while client.info == INFO or client.state != "ready":
            assert client.state in ("ready", "loading")
            await asyncio.sleep(0.01)
        with client.submit(REQUEST) as running:
            assert [event async for event in running]
    await client.close()
    assert client.state == "available"


async def test_requests_of_a_worker_that_is_closed_while_it_ends_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    never = asyncio.Event()

    async def ended(process: asyncio.subprocess.Process) -> int:
        code = await process.wait()
        await never.wait()
        return code

    monkeypatch.setattr(module, "ended", ended)
    client = EngineClient("toy", EngineSettings("toy:ms_per_token=50", 4, 0), 64)
    client.start()
    await client.wait_ready()
    with client.submit(REQUEST) as running:
        _kill_unnoticed()
        while client._writer:
            await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(EngineDied):
            async for _ in running:
                pass
    assert client.n_requests == 0


# What waits or is held elsewhere


async def test_a_stream_whose_client_left_before_the_first_byte_ends_its_request() -> None:
    ended = asyncio.Event()

    async def events() -> AsyncGenerator[str, None]:
        try:
            yield "first"
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def stream(source: AsyncGenerator[str, None]) -> AsyncGenerator[bytes, None]:
        async for event in source:
            yield event.encode()

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        raise OSError("the client has left")

    request: Any = type("Request", (), {"receive": staticmethod(receive)})()
    source = await start_events(request, events(), 5)
    response = EventStream(stream(source), source=source)
    await response({"type": "http"}, receive, send)
    assert ended.is_set()


async def test_a_stream_that_began_without_an_event_ends_its_request_too() -> None:
    ended = asyncio.Event()

    async def events() -> AsyncGenerator[str, None]:
        try:
            await asyncio.sleep(60)
            yield "first"
        finally:
            ended.set()

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    request: Any = type("Request", (), {"receive": staticmethod(receive)})()
    source = await start_events(request, events(), 0.01)
    await source.aclose()
    assert ended.is_set()


def _service(directory: Path, **settings: Any) -> Service:
    models = {"one": "toy:", "two": "toy:"}
    return Service(load_settings(None, models=models, cache_dir=directory, **settings), lambda _: None)


@pytest.mark.slow
async def test_a_model_whose_tokenizer_can_not_be_loaded_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = _service(tmp_path)
    await service.load()
    two = service.model("two")

    async def fails(*_: Any) -> None:
        raise StartupError("no tokenizer")

    with monkeypatch.context() as patched:
        patched.setattr(PromptClient, "start", fails)
        for _ in range(2):
            with pytest.raises(Unavailable, match="no tokenizer"):
                async with service.models.use(two):
                    pass
            assert service.model("two").engine.state in ("available", "failed")
            assert not service.models.is_busy("two")
    async with service.models.use(two) as model:
        assert model.prompts
    await service.close()


async def test_a_model_whose_file_has_gone_since_it_was_named_is_not_found(tmp_path: Path) -> None:
    service = _service(tmp_path)
    two = service.model("two")
    del service.models.all["two"]
    with pytest.raises(ModelNotFound):
        async with service.models.use(two):
            pass
    assert not service.models._users["two"]
    await service.close()


async def test_whoever_waits_for_a_declared_cache_is_told_when_its_declaration_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = _service(tmp_path, caches={"keeper": {"prompt": PROMPT}})

    def fails(*_: Any) -> Any:
        raise RuntimeError("unexpected")

    monkeypatch.setattr(Declared, "_is_met", fails)
    await service.load()
    with pytest.raises(Exception, match="An unexpected error"):
        await asyncio.wait_for(service.caches._caching.find(service.model("one"), "keeper"), 20)
    assert service.caches.building("") == []
    await service.close()


async def test_idle_models_are_unloaded_after_a_look_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = _service(tmp_path, idle_unload_seconds=0.05)
    genuine, failures = service.models._stop, iter([RuntimeError("unexpected")])

    async def stop(name: str) -> None:
        for failure in failures:
            raise failure
        await genuine(name)

    monkeypatch.setattr(service.models, "_stop", stop)
    await service.load()
    async with asyncio.timeout(20):
        while service.models.is_loaded("one"):
            await asyncio.sleep(0.02)
    await service.close()


async def test_a_prompt_process_that_is_closed_before_it_was_asked_anything_ends() -> None:
    assert await facts_of("toy:", None)
    commands = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    assert not [command for command in commands if "headstart.prompt.process" in command]


async def test_whoever_is_cancelled_while_a_prompt_process_is_closed_stays_cancelled() -> None:
    client = PromptClient("toy", 10)
    await client.start(protocol.Load("toy:", None))
    await asyncio.sleep(0.01)
    closing = asyncio.create_task(client.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await client.close()
