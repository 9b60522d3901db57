"""The runtime with one model loaded, as the engine uses it: one run at a time, everything else checked.

Whatever the library is told is told here; what its structures look like is in `layouts.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from headstart.engine.rkllm.options import RuntimeOptions
from headstart.messages import Sampling

OnToken = Callable[[int, bytes], bool]
Outcome = Literal["ended", "length", "aborted"]


@dataclass(frozen=True)
class Run:
    """What the runtime says of a run that finished. `outcome`: "ended" by the model's end token, "length" by
    the most tokens that were allowed, "aborted". `tokens`: how many were handed on. The rest is from
    the runtime's own counters, None where it has none (`Runtime.has_perf`) or gave none; `prefill_tokens` is
    what was evaluated of the prompt, so less than the prompt has where a prefix was reused."""

    outcome: Outcome
    tokens: int
    prefill_tokens: int | None = None
    prefill_ms: float | None = None
    generated_tokens: int | None = None
    generate_ms: float | None = None
    memory_mb: float | None = None


class Runtime:
    """Raises ModelError when the library or the model can't be loaded. Not safe for threads but for `abort`.

    `version` is the library's own, "1.2.3"; `abi` the layout it is spoken to in, "1.2.1".
    `per_request_sampling`: `run` uses its own sampling and cap; else they are those of the options, and `run`
    ends an answer that is to be shorter by aborting it. `has_perf`: the runtime counts what it prefilled;
    without it nothing confirms a hit.
    """

    version: str
    abi: str
    per_request_sampling: bool
    has_perf: bool

    def __init__(self, model_path: str, options: RuntimeOptions) -> None:
        raise NotImplementedError

    def run(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        save_to: str | None = None,
        keep_history: int = 0,
        on_token: OnToken,
    ) -> Run:
        """Runs the whole prompt, which is never wrapped by a template; the longest prefix in common with the
        loaded cache or the last run is reused. Comes back when the runtime has said that it is finished.

        `on_token` gets each token and its text, which is b"" while a character is incomplete, in a thread of
        the runtime's; after it has said False it isn't called again. `save_to`: an absolute path; that the
        file was written must be checked, since the runtime doesn't tell. Raises ModelError; where `lost` is
        set then, the runtime must not be used any more.
        """
        raise NotImplementedError

    def abort(self) -> None:
        """Ends the run there is, once its prefill is done; from any thread, at any time."""
        raise NotImplementedError

    def load_cache(self, path: str) -> None:
        """In place of the one that is loaded. Raises ModelError if the runtime refuses it; none is loaded
        then."""
        raise NotImplementedError

    def release_cache(self) -> None:
        """Nothing if none is loaded. Raises ModelError."""
        raise NotImplementedError

    def clear(self) -> None:
        """Forgets what the last run left in memory. Raises ModelError."""
        raise NotImplementedError

    def close(self) -> None:
        """May be called twice."""
        raise NotImplementedError
