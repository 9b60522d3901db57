"""The server's side of a worker process: starts it, sends it requests, restarts it when it dies."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Literal

import msgspec

from headstart.engine.channel import Frames, frame
from headstart.errors import (
    BadRequest,
    EngineDied,
    EngineError,
    ModelLoading,
    OutOfMemory,
    Overloaded,
    StartupError,
    StorageError,
    StorageFull,
    Unavailable,
)
from headstart.folder import is_rkllm
from headstart.messages import (
    Cancel,
    Command,
    Embed,
    Embedded,
    EngineSettings,
    Failed,
    Finished,
    LoadFailed,
    ModelInfo,
    Ready,
    RequestEvent,
    Step,
    Submit,
    WorkerMessage,
)

log = logging.getLogger(__name__)

READ_BYTES = 1 << 20
SPIN_COUNT = "1000"
HUGE_PAGES = "glibc.malloc.hugetlb=1"
CRASHES = ("SIGILL", "SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE")
RESTART_SECONDS = (0.0, 1.0, 5.0, 30.0)
FAILURES = {
    "engine": EngineError,
    "grammar": BadRequest,
    "memory": OutOfMemory,
    "storage": StorageError,
    "storage_full": StorageFull,
    "died": EngineDied,
}

# available: there is no worker, but one can be started.
State = Literal["available", "loading", "ready", "failed"]


class Running:
    """A submitted request: iterate over its events, the last of them Finished, one for each of its `n`
    answers, whose ids follow each other, or Embedded. Use it as a context manager: leaving it early cancels
    the sequences, which then end within one engine step."""

    def __init__(self, first_id: int, n: int, engine: EngineClient) -> None:
        self.id = first_id
        self.ids = range(first_id, first_id + n)
        self.engine = engine
        self._events: asyncio.Queue[RequestEvent] = asyncio.Queue()
        self._open = set(self.ids)

    def tell(self, event: RequestEvent) -> None:
        self._events.put_nowait(event)

    def cancel(self, answer: int = 0) -> None:
        """Asks for the end of one answer; Finished is still to come."""
        self.engine.send(Cancel(self.id + answer))

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.forget(self)
        for open_id in self._open:
            self.engine.send(Cancel(open_id))

    async def __aiter__(self) -> AsyncIterator[RequestEvent]:
        """Raises an error of the tree when one of the answers fails."""
        while self._open:
            event = await self._events.get()
            if isinstance(event, Finished | Embedded | Failed):
                self._open.discard(event.id)
            if isinstance(event, Failed):
                raise FAILURES[event.kind](event.message)
            yield event


class EngineClient:
    """One worker and its requests. `max_waiting` bounds the requests beyond those the slots can hold."""

    def __init__(self, name: str, settings: EngineSettings, max_waiting: int) -> None:
        self.name = name
        self.settings = settings
        self.max_waiting = max_waiting
        self.state: State = "available"
        self.info: ModelInfo | None = None
        self.failure = ""
        self.out_of_memory = False
        self._next_id = 1
        self._requests: dict[int, Running] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._settled = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def n_requests(self) -> int:
        return len(self._requests)

    def start(self) -> None:
        """Runs a worker from now on, until `close`."""
        self.state, self.failure, self.out_of_memory = "loading", "", False
        self._settled.clear()
        self._supervisor = asyncio.create_task(self._supervise(), name=f"engine {self.name}")

    async def wait_ready(self) -> ModelInfo:
        """Returns when the model is loaded. Raises StartupError when it can't be or was closed, or
        OutOfMemory where it was not to take more than there is."""
        await self._settled.wait()
        if self.out_of_memory:
            raise OutOfMemory(self.failure)
        if self.info is None or self.state in ("failed", "available"):
            raise StartupError(self.failure or "it was stopped while it was being loaded")
        return self.info

    async def close(self) -> None:
        """Ends the worker; requests still running fail with EngineDied. It can be started again."""
        self.state = "available"
        supervisor, self._supervisor = self._supervisor, None
        if supervisor:
            supervisor.cancel()
            with suppress(asyncio.CancelledError):
                await supervisor
        self._settled.set()

    def check_available(self) -> None:
        """Raises Unavailable when a request could not be taken now."""
        if self.state == "failed":
            raise Unavailable(f"Model {self.name!r} can't run: {self.failure}")
        if self._writer is None or self.info is None or self.state != "ready":
            raise ModelLoading(f"Model {self.name!r} is still loading.")
        if self.n_requests >= self.info.slots + self.max_waiting:
            raise Overloaded("As many requests are running and waiting as may.")

    def submit(self, request: Submit | Embed) -> Running:
        """Sends the request to the worker, giving it an `id`. Raises Unavailable when it can't be taken, and
        BadRequest for what the model doesn't do."""
        self.check_available()
        if isinstance(request, Submit) and self.info and not self.info.generates:
            raise BadRequest(
                f"Model {self.name!r} makes embeddings only: it can't generate text.", param="model"
            )
        n = request.n if isinstance(request, Submit) else 1
        running = Running(self._next_id, n, self)
        self._next_id += n
        self._requests |= dict.fromkeys(running.ids, running)
        self.send(msgspec.structs.replace(request, id=running.id))
        return running

    def forget(self, running: Running) -> None:
        for request_id in running.ids:
            self._requests.pop(request_id, None)

    def send(self, command: Command) -> None:
        if self._writer is not None:
            self._writer.write(frame(command))

    async def _supervise(self) -> None:
        failures, loaded = 0, False
        while True:
            try:
                was_ready = await self._run_worker()
            except OSError as error:
                was_ready, self.failure = False, f"the worker process can't be started: {error}"
            failures = 0 if was_ready else failures + 1
            loaded = loaded or was_ready
            if not was_ready and (not loaded or failures >= len(RESTART_SECONDS)):
                self.state = "failed"
                self._settled.set()
                return
            self.state = "loading"
            await asyncio.sleep(RESTART_SECONDS[failures])

    async def _run_worker(self) -> bool:
        """Runs one worker process to its end; whether it had become ready."""
        ours, theirs = socket.socketpair()
        process = await asyncio.create_subprocess_exec(
            # -P: what lies in the current folder is no part of the program.
            *(sys.executable, "-P", "-m", "headstart.engine.worker", str(theirs.fileno())),
            msgspec.json.encode(self.settings).decode(),
            pass_fds=[theirs.fileno()],
            stdin=asyncio.subprocess.DEVNULL,
            env=worker_environment(),
        )
        theirs.close()
        ready = False
        try:
            reader, self._writer = await asyncio.open_connection(sock=ours)
            async for message in _messages(reader):
                ready = self._dispatch(message) or ready
        finally:
            self._disconnect()
            reason = _explain_exit(await _ended(process), self.settings.path)
            self._fail_requests(reason)
        if not ready:
            self.failure = self.failure or reason
        log.error("worker of %s ended: %s", self.name, self.failure or reason)
        return ready

    def _dispatch(self, message: WorkerMessage) -> bool:
        match message:
            case Ready(info=info, tuning=tuning):
                self.info, self.state, self.failure = info, "ready", ""
                # A worker that takes this one's place need not measure again.
                self.settings = msgspec.structs.replace(self.settings, tuning=tuning)
                self._settled.set()
                return True
            case LoadFailed(message=reason, out_of_memory=out_of_memory):
                self.failure, self.out_of_memory = reason, out_of_memory
            case Step(events=events):
                for event in events:
                    if running := self._requests.get(event.id):
                        running.tell(event)
        return False

    def _disconnect(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None
        if self.state == "ready":
            self.state = "loading"

    def _fail_requests(self, reason: str) -> None:
        for request_id, running in self._requests.items():
            message = f"The engine died and is being restarted: {reason}."
            running.tell(Failed(request_id, "died", message))


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[WorkerMessage]:
    frames: Frames[WorkerMessage] = Frames(WorkerMessage)
    with suppress(ConnectionResetError):
        while data := await reader.read(READ_BYTES):
            for message in frames.feed(data):
                yield message


async def _ended(process: asyncio.subprocess.Process) -> int:
    """The worker leaves by itself when its socket closes, after the step it is in."""
    try:
        return await asyncio.wait_for(asyncio.shield(process.wait()), 10)
    except TimeoutError:
        process.kill()
        return await process.wait()


def worker_environment() -> dict[str, str]:
    """OpenMP's threads wait for each other by spinning, by default so long that a second busy process on the
    same CPUs makes decoding tens of times slower. Huge pages make it quick to clear a KV cache at the start.
    (Figures for both in docs/architecture.md.) What the user has set is kept."""
    ours = {"GLIBC_TUNABLES": HUGE_PAGES}
    if "OMP_WAIT_POLICY" not in os.environ:
        ours["GOMP_SPINCOUNT"] = SPIN_COUNT
    return ours | os.environ


def _explain_exit(code: int, path: str) -> str:
    if code >= 0:
        return f"the worker process exited with status {code}"
    name = signal.Signals(-code).name
    text = f"the worker process was ended by {name}"
    if name in CRASHES and is_rkllm(path):
        return (
            f"{text}. At start-up this means that the NPU's runtime is another release than it was taken "
            "for, or doesn't fit the driver: see `headstart doctor`"
        )
    if name in CRASHES:
        text += (
            ". At start-up this means that llama.cpp was built for another CPU or by a faulty compiler. "
            "Build it again: `make rebuild`; if that doesn't help, `export CMAKE_ARGS=-DGGML_NATIVE=OFF` and "
            "`make rebuild`, which is slower but runs everywhere"
        )
    return text
