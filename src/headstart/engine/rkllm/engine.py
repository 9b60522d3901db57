"""The engine of models that the NPU runs: one request after another, whole prompts, states as files.

The runtime evaluates and samples by itself, blocking a thread of its own here; its tokens come from yet
another. Both tell what happened through a queue, and `wake` has a step take it from there.

What the runtime has in memory of the run before it finds again by itself, whoever's that was. So it is made
to forget what isn't to be shared; and a state is loaded only where memory doesn't hold as much already.
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
from headstart.engine.core.state_io import drained
from headstart.engine.model import ModelError
from headstart.engine.rkllm import saved_state
from headstart.engine.rkllm.info import info_of
from headstart.engine.rkllm.runtime import Runtime, RuntimeLost
from headstart.engine.rkllm.turn import Turn
from headstart.protocol import (
    Cancel,
    Command,
    Failed,
    FailureKind,
    Finished,
    FinishReason,
    Progress,
    RequestEvent,
    StateRef,
    Submit,
    Token,
)
from headstart.tokens import common_prefix

log = logging.getLogger(__name__)

LOST_STATUS = 70


class RkllmEngine:
    """Every submitted request ends in exactly one Finished or Failed event. `opened` gives a runtime with the
    model loaded, now and again after a run that failed; it raises ModelError. All methods are for one thread.
    `wake` is called from others."""

    def __init__(self, opened: Callable[[], Runtime], wake: Callable[[], object]) -> None:
        self._opened = opened
        self._wake = wake
        self._runtime: Runtime | None = opened()
        self.info = info_of(self._runtime)
        self._waiting: deque[Turn] = deque()
        self._running: Turn | None = None
        self._told: SimpleQueue[RequestEvent] = SimpleQueue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="npu")
        # What the runtime's memory holds, and for whom it was computed; for the thread only, as is all below.
        self._held: list[int] = []
        self._owner = ""
        # Whether memory is used as the runtime's manual says; the counts may disprove it.
        self._remembers = self.info.counts_reuse

    @property
    def busy(self) -> bool:
        """Whether a step has something to do now; while the runtime runs it has not."""
        return not self._told.empty() or bool(self._waiting and self._running is None)

    @property
    def idle(self) -> bool:
        return not self.busy and self._running is None

    def handle(self, command: Command) -> None:
        match command:
            case Submit():
                self._waiting.append(Turn(command))
            case Cancel(id=request_id):
                self._cancel(request_id)

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
                self._told.put(Finished(request_id, "cancelled", turn.stats()))
                return

    def step(self) -> list[RequestEvent]:
        """What happened since the last one, in order; the next request begins when one has ended."""
        events = list(drained(self._told))
        turn = self._running
        if turn and any(isinstance(e, Finished | Failed) and e.id == turn.request.id for e in events):
            self._running = None
        if self._running is None and self._waiting:
            self._running = self._waiting.popleft()
            self._thread.submit(self._serve, self._running)
        return events

    def close(self) -> None:
        """Ends the run there is and frees the model."""
        if turn := self._running:
            self._cancel(turn.request.id)
        self._thread.shutdown()
        if runtime := self._runtime:
            runtime.close()

    def _tell(self, event: RequestEvent) -> None:
        self._told.put(event)
        self._wake()

    def _serve(self, turn: Turn) -> None:
        """Runs on the thread."""
        turn.placed = monotonic()
        try:
            end = self._answer(turn) if turn.is_answer else self._save(turn)
        except RuntimeLost as error:
            # Nothing but another process helps; the server starts one.
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
        held = self._keep(turn, runtime)
        if request.restore and request.reuse and held < _usable(request.restore, request):
            self._load(turn, request.restore, runtime)
        elif not held:
            # Some runtimes forget everything with it, so not earlier.
            runtime.release_cache()
        turn.restored = monotonic()
        self._run(turn, runtime)
        if turn.run and held > turn.cached and not turn.loaded:
            log.warning("the NPU runtime reused %d of %d tokens that it had", turn.cached, held)
            self._remembers = False
        return Finished(request.id, self._reason(turn), turn.stats())

    def _ready(self) -> Runtime:
        if self._runtime is None:
            self._runtime = self._opened()
        return self._runtime

    def _keep(self, turn: Turn, runtime: Runtime) -> int:
        """How many of the prompt's tokens memory holds for it; what it may not have is forgotten."""
        request = turn.request
        held = min(common_prefix(self._held, request.tokens), len(request.tokens) - 1)
        theirs = self._owner == request.owner or held <= request.public
        if self._held and not (request.reuse and theirs):
            self._forget(runtime)
            return 0
        return held if self._remembers else 0

    def _forget(self, runtime: Runtime) -> None:
        runtime.release_cache()
        runtime.clear()
        self._held = []

    def _load(self, turn: Turn, state: StateRef, runtime: Runtime) -> None:
        """That a file is gone, changed or refused is no error, only a miss."""
        self._held = []
        try:
            _check_identity(state)
            runtime.load_cache(state.path)
            turn.loaded = state
            _check_identity(state)
        except (OSError, ModelError) as error:
            log.warning("state not restored from %s: %s", state.path, error)
            if turn.loaded:
                # It has read what nobody has verified.
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
        self._held, self._owner = [*request.tokens, *turn.generated], request.owner

    def _drop(self) -> None:
        """A runtime of which something failed is not used again; the next request has another one."""
        runtime, self._runtime, self._held = self._runtime, None, []
        try:
            if runtime:
                runtime.close()
        except ModelError as error:
            log.warning("%s", error)

    def _on_token(self, turn: Turn, token: int, _text: bytes) -> bool:
        """Runs on a thread of the runtime's. Text is made of the ids, elsewhere: stop strings and halves of
        characters are not the runtime's to decide on."""
        request = turn.request
        if not turn.first_token:
            turn.first_token = monotonic()
            if not turn.is_answer:
                self._tell(Progress(request.id, len(request.tokens), len(request.tokens)))
        if not turn.cancelled and len(turn.generated) < request.max_tokens:
            turn.generated.append(token)
            self._tell(Token(request.id, token))
        return not turn.cancelled

    def _reason(self, turn: Turn) -> FinishReason:
        if turn.cancelled:
            return "cancelled"
        full = len(turn.request.tokens) + len(turn.generated) >= self.info.n_ctx
        ended = turn.run and turn.run.outcome == "ended" and turn.request.max_tokens > 0
        return "stop" if ended and not full else "length"

    def _save(self, turn: Turn) -> RequestEvent:
        """What is saved is evaluated from the first token on, so that nothing else has a part in it."""
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
        """Raises NotWritten unless the runtime takes what it has written: it doesn't tell that the disk was
        full."""
        self._held = []
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
    """Raises OSError when the file is not the one that was verified."""
    stat = Path(state.path).lstat()
    found = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if not S_ISREG(stat.st_mode) or found != state.identity:
        raise OSError("another file than the one that was verified")
