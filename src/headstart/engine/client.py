"""The server's side of a worker process: starts it, sends it requests, restarts it when it dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal

import msgspec

from headstart.channel import Garbled, Unsendable, frame
from headstart.engine.launcher import Launcher
from headstart.engine.submitted_request import EngineLoad, PendingForgets, SubmittedRequest
from headstart.engine.worker_process import connected, ended, explain_exit, kill, messages
from headstart.errors import (
    BadRequest,
    EngineDied,
    ModelLoading,
    OutOfMemory,
    Overloaded,
    StartupError,
    Unavailable,
)
from headstart.protocol import (
    Begin,
    Cancel,
    Embed,
    EngineSettings,
    Failed,
    Forget,
    Forgotten,
    LoadFailed,
    ModelInfo,
    Ready,
    SetStateLimits,
    Step,
    StoreReport,
    Submit,
    WorkerMessage,
)

log = logging.getLogger(__name__)

DIED = "The engine died and is being restarted."
STOPPED = "The engine was stopped."
RESTART_SECONDS = (0.0, 1.0, 5.0, 30.0)
# The fields of a StoreReport that count from the worker's start on.
STORE_COUNTS = ("evictions", "parked", "park_ms", "given_up", "verify_failures", "write_failures")

# "available": there is no worker, but one can be started.
EngineState = Literal["available", "loading", "ready", "failed"]


class EngineClient:
    """One worker and its requests. `max_waiting`: the most requests besides those in slots."""

    def __init__(self, name: str, settings: EngineSettings, max_waiting: int) -> None:
        self.name = name
        self.settings = settings
        self.max_waiting = max_waiting
        self.launcher = Launcher(settings.path)
        self.state: EngineState = "available"
        self.info: ModelInfo | None = None
        self.failure = ""
        self.out_of_memory = False
        self._next_id = 1
        # Workers that were started in place of one that ended by itself, since the start.
        self.n_restarts = 0
        self._requests: dict[int, SubmittedRequest] = {}
        self._forgets = PendingForgets()
        # The last report of the present worker's store, and the counts of the workers before; `on_store` is
        # called after each report.
        self._store = StoreReport()
        self._earlier = StoreReport()
        self.has_reported = False
        self.on_store: Callable[[], object] = lambda: None
        self._begun_with = settings.states
        self._writer: asyncio.StreamWriter | None = None
        self._load_ended = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def n_requests(self) -> int:
        return len(self._requests)

    def load(self) -> EngineLoad:
        requests = {running.id: running for running in self._requests.values()}.values()
        begun = [running for running in requests if running.has_begun]
        n_tokens = sum(running.n_prompt + running.n_generated for running in begun)
        room = self.info.slots * self.info.n_ctx if self.info else 0
        return EngineLoad(len(begun), len(requests) - len(begun), n_tokens / room if room else 0.0)

    @property
    def store(self) -> StoreReport:
        """The state store as last reported: its content is empty without a worker, its counts are since the
        server's start."""
        counts = {name: getattr(self._earlier, name) + getattr(self._store, name) for name in STORE_COUNTS}
        return msgspec.structs.replace(self._store, **counts)

    def start(self) -> None:
        """Runs a worker from now on, until `close`."""
        self.state, self.failure, self.out_of_memory = "loading", "", False
        self._load_ended.clear()
        self._supervisor = asyncio.create_task(self._supervise(), name=f"engine {self.name}")

    def fail(self, reason: str) -> None:
        """Marks the model as failed without starting a worker; `start` can still be called."""
        self.state, self.failure = "failed", reason
        self._load_ended.set()

    async def wait_ready(self) -> ModelInfo:
        """Returns when the model is loaded. Raises StartupError if it can't be loaded or was closed,
        OutOfMemory if `within_memory` is set and memory is short."""
        await self._load_ended.wait()
        if self.out_of_memory:
            raise OutOfMemory(self.failure)
        if self.info is None or self.state in ("failed", "available"):
            raise StartupError(self.failure or "it was stopped while it was being loaded")
        return self.info

    async def close(self) -> None:
        """Ends the worker; requests still running fail at once with EngineDied. Returns when the worker has
        written what it holds, or was killed after 10 seconds. It can be started again."""
        self.state = "available"
        supervisor, self._supervisor = self._supervisor, None
        try:
            if supervisor:
                supervisor.cancel()
                await asyncio.wait([supervisor])
            await self.launcher.discard()
        finally:
            self._load_ended.set()

    def check_available(self) -> None:
        """Raises Unavailable if a request would not be accepted now."""
        if self.state == "failed":
            raise Unavailable(f"Model {self.name!r} can't run: {self.failure}")
        if self._writer is None or self.info is None or self.state != "ready":
            raise ModelLoading(f"Model {self.name!r} is still loading.")
        if self.n_requests >= self.info.slots + self.max_waiting:
            raise Overloaded("The maximum number of requests is running and waiting.")

    def submit(self, request: Submit | Embed) -> SubmittedRequest:
        """Sends the request to the worker with a new `id`. Raises Unavailable if it isn't accepted,
        BadRequest if the model doesn't support it or it can't be encoded; then it takes no place in the
        queue."""
        self.check_available()
        if isinstance(request, Submit) and self.info and not self.info.generates:
            raise BadRequest(
                f"Model {self.name!r} makes embeddings only: it can't generate text.", param="model"
            )
        n = request.n if isinstance(request, Submit) else 1
        n_prompt = len(request.tokens) if isinstance(request, Submit) else 0
        running = SubmittedRequest(self._next_id, n, self, n_prompt)
        try:
            self._write(frame(msgspec.structs.replace(request, id=running.id)))
        except Unsendable as error:
            raise BadRequest(f"The engine can't be sent this request: {error}.") from error
        # Registered only after it was sent: nothing waits for an unsent request.
        self._next_id += n
        self._requests |= dict.fromkeys(running.ids, running)
        return running

    async def forget(
        self, owner: str | None, tokens: list[int] | None = None, kept: Sequence[list[int]] = ()
    ) -> int:
        """Has states removed as Forget says; returns the number of blocks. Raises EngineDied if the worker
        ends meanwhile or doesn't answer in time, ModelLoading if there is none."""
        if self._writer is None or self.state != "ready":
            raise ModelLoading(f"Model {self.name!r} is still loading.")
        request_id, self._next_id = self._next_id, self._next_id + 1
        self._write(frame(Forget(request_id, owner, tokens, list(kept))))
        return await self._forgets.answer(request_id)

    def set_state_limits(self, memory_bytes: int, disk_bytes: int) -> None:
        """Limits the state store, of this worker and those that replace it."""
        limits = {"memory_bytes": memory_bytes, "disk_bytes": disk_bytes}
        states = msgspec.structs.replace(self.settings.states, **limits)
        self.settings = msgspec.structs.replace(self.settings, states=states)
        if self.state == "ready":
            self._send_state_limits()

    def _send_state_limits(self) -> None:
        if self.settings.states != self._begun_with:
            self._begun_with = states = self.settings.states
            with suppress(EngineDied):
                self._write(frame(SetStateLimits(states.memory_bytes, states.disk_bytes)))

    def release(self, running: SubmittedRequest) -> None:
        """The request's events are no longer wanted."""
        for request_id in running.ids:
            self._requests.pop(request_id, None)

    def cancel(self, request_id: int) -> None:
        """Ends one answer of a request. A worker that is gone has ended all of its requests already."""
        with suppress(EngineDied):
            self._write(frame(Cancel(request_id)))

    def _write(self, data: bytes) -> None:
        """Raises EngineDied if no worker will read it."""
        writer = self._writer
        if writer is None or writer.is_closing():
            raise EngineDied(DIED)
        try:
            writer.write(data)
        except (OSError, RuntimeError) as error:
            # Event loops differ in the error they raise when they have just noticed the connection's end.
            raise EngineDied(DIED) from error

    async def _supervise(self) -> None:
        """Runs one worker after the other, until cancelled, or until it gives up and the model is failed."""
        failures, loaded = 0, False
        while True:
            try:
                was_ready = await self._run_worker()
            except OSError as error:
                was_ready, self.failure = False, f"the worker process can't be started: {error}"
            except Exception as error:
                # Any exception: nobody else would notice that no worker runs any more.
                log.exception("the worker of %s can't be run", self.name)
                was_ready, self.failure = False, f"the worker process can't be run: {error}"
            failures = 0 if was_ready else failures + 1
            loaded = loaded or was_ready
            if not was_ready and (not loaded or failures >= len(RESTART_SECONDS)):
                self.state = "failed"
                self._load_ended.set()
                return
            self.state = "loading"
            self.n_restarts += 1
            await asyncio.sleep(RESTART_SECONDS[failures])

    async def _run_worker(self) -> bool:
        """Runs one worker process to its end and returns whether it had become ready. However it ends, all
        its requests have failed then. Raises OSError if it can't be started."""
        process, ours = await self.launcher.take()
        ready, reason = False, "it was stopped"
        try:
            reader, self._writer = await connected(ours)
            self._begun_with = self.settings.states
            self._writer.write(frame(Begin(self.settings)))
            async for message in messages(reader):
                ready = self._dispatch(message) or ready
        except Garbled as error:
            log.error("unreadable message from the worker of %s: %s", self.name, error)
            kill(process)
        except asyncio.CancelledError:
            # Its requests don't wait until it has written what it holds.
            self._fail_requests(STOPPED)
            raise
        finally:
            self._disconnect()
            try:
                reason = explain_exit(await ended(process), self.settings.path)
            finally:
                self._fail_requests(f"{DIED.rstrip('.')}: {reason}.")
        if not ready:
            self.failure = self.failure or reason
        log.error("worker of %s ended: %s", self.name, self.failure or reason)
        return ready

    def _dispatch(self, message: WorkerMessage) -> bool:
        match message:
            case Ready(info=info, tuning=tuning):
                self.info, self.state, self.failure = info, "ready", ""
                # A worker that replaces this one need not measure again.
                self.settings = msgspec.structs.replace(self.settings, tuning=tuning)
                self._load_ended.set()
                self._send_state_limits()
                return True
            case StoreReport():
                self._store, self.has_reported = message, True
                self.on_store()
            case LoadFailed(message=reason, out_of_memory=out_of_memory):
                self.failure, self.out_of_memory = reason, out_of_memory
            case Step(events=events):
                for event in events:
                    if running := self._requests.get(event.id):
                        running.tell(event)
                    elif isinstance(event, Forgotten):
                        self._forgets.tell(event)
        return False

    def _disconnect(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None
        self._earlier, self._store, self.has_reported = self.store, StoreReport(), False
        if self.state == "ready":
            self.state = "loading"

    def _fail_requests(self, message: str) -> None:
        for request_id, running in self._requests.items():
            running.tell(Failed(request_id, "died", message))
        self._forgets.fail(message)
