"""One run, as reported by its callbacks. They arrive on a thread of the runtime's, with its memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from headstart.engine.rkllm.layouts import State

OnToken = Callable[[int, bytes], bool]
Outcome = Literal["ended", "length", "aborted"]


@dataclass(frozen=True)
class Run:
    """The runtime's report of a finished run. `outcome`: "ended" by the model's end token, "length" by the
    token limit, or "aborted". `tokens`: the number passed on. The other fields are from the runtime's own
    counters, None if it has none (`Runtime.has_perf`) or returned none. `prefill_tokens` is the number of
    evaluated prompt tokens, so less than the prompt's if a prefix was reused."""

    outcome: Outcome
    tokens: int
    prefill_tokens: int | None = None
    prefill_ms: float | None = None
    generated_tokens: int | None = None
    generate_ms: float | None = None
    memory_mb: float | None = None


class Running:
    """`finished` is set by the last callback. `abort_now` is set whenever the runtime should be told to
    abort; more than once, since it may ignore that before the end of the prefill. `stops_itself`: the runtime
    stops at `max_tokens` by itself."""

    def __init__(
        self, number: int, on_token: OnToken, max_tokens: int, *, stops_itself: bool, has_perf: bool
    ) -> None:
        self.number = number
        self.finished = threading.Event()
        self.abort_now = threading.Event()
        self.failed = False
        self.error: BaseException | None = None
        self.tokens = 0
        self._on_token = on_token
        self._max_tokens = max_tokens
        self._stops_itself = stops_itself
        self._has_perf = has_perf
        self._wanted_by: Outcome | None = None
        self._perf: tuple[int, float, int, float, float] | None = None

    @property
    def aborted_early(self) -> bool:
        """Whether the run was aborted before its second token."""
        return self._wanted_by is not None and self.tokens <= 1

    def abort(self, why: Outcome = "aborted") -> None:
        self._wanted_by = self._wanted_by or why
        self.abort_now.set()

    def tell(self, result: Any, state: int) -> None:
        """Handles one callback; `result` is valid until this returns. Never raises."""
        try:
            self._tell(result, state)
        except BaseException as error:
            # An exception must not reach the C code; `run` raises it.
            self.error = error
            self.abort()
        if state in (State.FINISH, State.ERROR):
            self.finished.set()

    def _tell(self, result: Any, state: int) -> None:
        if state == State.ERROR:
            self.failed = True
        elif state == State.FINISH:
            self._perf = _perf_of(result.contents) if self._has_perf and result else None
        elif self._wanted_by:
            self.abort_now.set()
        elif result:
            self._count(result.contents.token_id, result.contents.text or b"")

    def _count(self, token: int, text: bytes) -> None:
        self.tokens += 1
        if not self._on_token(token, text):
            self.abort()
        elif self.tokens >= self._max_tokens and not self._stops_itself:
            self.abort("length")

    def result(self) -> Run:
        at_limit: Outcome = "length" if self.tokens >= self._max_tokens else "ended"
        return Run(self._wanted_by or at_limit, self.tokens, *(self._perf or ()))


def _perf_of(result: Any) -> tuple[int, float, int, float, float]:
    perf = result.perf
    return (
        perf.prefill_tokens,
        perf.prefill_time_ms,
        perf.generate_tokens,
        perf.generate_time_ms,
        perf.memory_usage_mb,
    )
