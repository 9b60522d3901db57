"""The NPU engine: one request after another, whole prompts, states as files.

The runtime evaluates and samples by itself and blocks a dedicated thread here; its tokens arrive on yet
another thread. Both put events into a queue, and `wake` causes a step to take them.

The runtime reuses its memory of the previous run by itself, whoever the owner was. So the engine clears the
memory if it must not be shared, and loads a state only if memory doesn't hold as much already.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from stat import S_ISREG
from time import monotonic

from msgspec.structs import replace

from headstart.engine.core import state_file
from headstart.engine.model import ModelError
from headstart.engine.rkllm import saved_state
from headstart.engine.rkllm.info import info_of
from headstart.engine.rkllm.runtime import Runtime, RuntimeLost
from headstart.engine.rkllm.turn import Turn
from headstart.engine.worker_engine import Wake
from headstart.protocol import (
    Cancel,
    Command,
    Failed,
    FailureKind,
    Finished,
    Forget,
    Forgotten,
    Progress,
    RequestEvent,
    SequenceEnd,
    StateRef,
    Submit,
    Token,
)
from headstart.queues import drained
from headstart.tokens import common_prefix

log = logging.getLogger(__name__)

LOST_STATUS = 70


class RkllmEngine:
    """Every submitted request ends in exactly one Finished or Failed event. `open_runtime` returns a runtime
    with the model loaded; it is called now and after each failed run, and raises ModelError. All methods must
    be called from one thread. `wake` is called from others."""

    def __init__(self, open_runtime: Callable[[], Runtime], wake: Wake) -> None:
        self._open_runtime = open_runtime
        self._wake = wake
        self._runtime: Runtime | None = open_runtime()
        self.info = info_of(self._runtime)
        self._waiting: deque[Turn] = deque()
        self._running: Turn | None = None
        self._events: SimpleQueue[RequestEvent] = SimpleQueue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="npu")
        # The tokens in the runtime's memory, and their owner. Only the NPU thread uses these and the next
        # field.
        self._in_memory: list[int] = []
        self._owner = ""
        # Whether the runtime reuses its memory as its manual says; the counts may disprove it.
        self._remembers = self.info.counts_reuse

    @property
    def busy(self) -> bool:
        """Whether a step has something to do now. A running request alone is nothing to do."""
        return not self._events.empty() or bool(self._waiting and self._running is None)

    @property
    def idle(self) -> bool:
        return not self.busy and self._running is None

    def handle(self, command: Command) -> None:
        match command:
            case Submit():
                self._waiting.append(Turn(command))
            case Cancel(id=request_id):
                self._cancel(request_id)
            case Forget(id=request_id):
                self._events.put(Forgotten(request_id, 0))

    def _cancel(self, request_id: int) -> None:
        turn = self._running
        if turn and turn.request.id == request_id:
            turn.cancelled = True
            if runtime := self._runtime:
                runtime.abort()
            return
        for turn in self._waiting:
            if turn.request.id == request_id:
                self._waiting.remove(turn)
                self._events.put(Finished(request_id, "cancelled", turn.stats()))
                return

    def step(self) -> list[RequestEvent]:
        """Returns the events since the last step, in order; starts the next request if none is running."""
        events = list(drained(self._events))
        turn = self._running
        if turn and any(isinstance(e, Finished | Failed) and e.id == turn.request.id for e in events):
            self._running = None
        if self._running is None and self._waiting:
            self._running = self._waiting.popleft()
            self._thread.submit(self._serve, self._running)
        return events

    # The runtime writes its states itself, when they are saved.
    pause = None

    def report(self) -> None:
        return None

    def flush(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        """Ends the current run and frees the model."""
        if turn := self._running:
            self._cancel(turn.request.id)
        self._thread.shutdown()
        if runtime := self._runtime:
            runtime.close()

    def _tell(self, event: RequestEvent) -> None:
        self._events.put(event)
        self._wake()

    def _serve(self, turn: Turn) -> None:
        """Runs on the NPU thread."""
        turn.placed = monotonic()
        try:
            end = self._answer(turn) if turn.is_answer else self._save(turn)
        except RuntimeLost as error:
            # Only a new process helps; the server starts one.
            log.critical("%s", error)
            os._exit(LOST_STATUS)
        except saved_state.NotWritten as error:
            end = Failed(turn.request.id, error.kind, str(error))
        except ModelError as error:
            self._drop()
            end = Failed(turn.request.id, "engine", str(error))
        except OSError as error:
            kind: FailureKind = "storage_full" if error.errno in state_file.NO_ROOM else "storage"
            end = Failed(turn.request.id, kind, f"state not written: {error.strerror}")
        except Exception as error:
            log.exception("a request failed")
            end = Failed(turn.request.id, "engine", f"the engine failed: {error!r}")
        self._tell(end)

    def _answer(self, turn: Turn) -> RequestEvent:
        request, runtime = turn.request, self._ready()
        n_in_memory = self._keep(turn, runtime)
        if request.restore and request.reuse and n_in_memory < _usable(request.restore, request):
            self._load(turn, request.restore, runtime)
        elif not n_in_memory:
            # Not earlier: some runtimes clear all memory with it.
            runtime.release_cache()
        turn.restored = monotonic()
        self._run(turn, runtime)
        if turn.run and n_in_memory > turn.cached and not turn.loaded:
            log.warning("the NPU runtime reused %d of %d tokens that it had", turn.cached, n_in_memory)
            self._remembers = False
        return Finished(request.id, self._reason(turn), turn.stats())

    def _ready(self) -> Runtime:
        if self._runtime is None:
            self._runtime = self._open_runtime()
        return self._runtime

    def _keep(self, turn: Turn, runtime: Runtime) -> int:
        """The number of the prompt's tokens in memory; clears memory that the request must not use."""
        request = turn.request
        n_in_memory = min(common_prefix(self._in_memory, request.tokens), len(request.tokens) - 1)
        theirs = self._owner == request.owner or n_in_memory <= request.public
        if self._in_memory and not (request.reuse and theirs):
            self._forget(runtime)
            return 0
        return n_in_memory if self._remembers else 0

    def _forget(self, runtime: Runtime) -> None:
        runtime.release_cache()
        runtime.clear()
        self._in_memory = []

    def _load(self, turn: Turn, state: StateRef, runtime: Runtime) -> None:
        """Loads the state. A file that is gone, changed or refused is no error, only a miss."""
        self._in_memory = []
        try:
            _check_identity(state)
            runtime.load_cache(state.path)
            turn.loaded = state
            _check_identity(state)
        except (OSError, ModelError) as error:
            log.warning("state not restored from %s: %s", state.path, error)
            if turn.loaded:
                # The runtime has read an unverified file.
                turn.loaded = None
                self._forget(runtime)

    def _run(self, turn: Turn, runtime: Runtime, save_to: str | None = None) -> None:
        if turn.cancelled:
            return
        request = turn.request
        turn.run = runtime.run(
            request.text,
            max_new_tokens=max(request.max_tokens, 1),
            sampling=request.sampling,
            save_to=save_to,
            on_token=partial(self._on_token, turn),
        )
        self._in_memory, self._owner = [*request.tokens, *turn.generated], request.owner

    def _drop(self) -> None:
        """Closes a runtime after a failure; the next request opens another one."""
        runtime, self._runtime, self._in_memory = self._runtime, None, []
        try:
            if runtime:
                runtime.close()
        except ModelError as error:
            log.warning("%s", error)

    def _on_token(self, turn: Turn, token: int, _text: bytes) -> bool:
        """Runs on a thread of the runtime's. Its text is ignored: the server makes text from the ids, and
        handles stop strings and incomplete characters."""
        request = turn.request
        if not turn.first_token:
            turn.first_token = monotonic()
            if not turn.is_answer:
                self._tell(Progress(request.id, len(request.tokens), len(request.tokens)))
        if not turn.cancelled and len(turn.generated) < request.max_tokens:
            turn.generated.append(token)
            self._tell(Token(request.id, token))
        return not turn.cancelled

    def _reason(self, turn: Turn) -> SequenceEnd:
        if turn.cancelled:
            return "cancelled"
        full = len(turn.request.tokens) + len(turn.generated) >= self.info.n_ctx
        ended = turn.run and turn.run.outcome == "ended" and turn.request.max_tokens > 0
        return "stop" if ended and not full else "length"

    def _save(self, turn: Turn) -> RequestEvent:
        """Computes and saves a state. It is evaluated from the first token on, so that it depends on nothing
        else."""
        request, runtime = turn.request, self._ready()
        assert request.save_to is not None
        path = Path(request.save_to.path)
        self._forget(runtime)
        turn.restored = monotonic()
        try:
            self._run(turn, runtime, save_to=str(path))
            if turn.cancelled:
                path.unlink(missing_ok=True)
                return Finished(request.id, "cancelled", turn.stats())
            computed = turn.stats()
            saved = saved_state.check(path, len(request.tokens))
            self._try(path, runtime)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        stats = replace(computed, saved_bytes=saved.nbytes, saved_blake3=saved.blake3)
        return Finished(request.id, "saved", stats)

    def _try(self, path: Path, runtime: Runtime) -> None:
        """Loads the saved state once, because the runtime doesn't report a full disk. Raises NotWritten if it
        can't be loaded."""
        self._in_memory = []
        try:
            runtime.load_cache(str(path))
            runtime.release_cache()
        except ModelError as error:
            raise saved_state.not_written(
                path, f"the NPU runtime can't read the state that it saved: {error}"
            ) from error


def _usable(state: StateRef, request: Submit) -> int:
    whole = state.n_tokens if request.shared is None else request.shared
    return min(whole, request.boundary)


def _check_identity(state: StateRef) -> None:
    """Raises OSError if the file is not the verified one."""
    stat = Path(state.path).lstat()
    found = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if not S_ISREG(stat.st_mode) or found != state.identity:
        raise OSError("another file than the one that was verified")
