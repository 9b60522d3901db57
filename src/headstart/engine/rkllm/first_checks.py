"""The first checks on a real board: everything that the header and the manual leave open. Each step runs in a
process of its own, since a wrong guess may crash. `python -m headstart.engine.rkllm.first_checks` reads a
`Task` as JSON from its input and prints its findings.

No code depends on the results; they are a report for people.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from headstart.engine.model import ModelError
from headstart.engine.rkllm.options import RuntimeOptions
from headstart.engine.rkllm.runtime import Runtime
from headstart.protocol import Sampling

GREEDY = Sampling(temperature=0)
ANSWER = 16
Found = dict[str, object]


class Task(Struct, frozen=True):
    """`openings`: two prefixes that end with a special token, each with its number of tokens by Headstart's
    tokenizer; `question`: the text that follows either prefix, with its number of tokens."""

    step: str
    model: str
    options: RuntimeOptions
    openings: tuple[tuple[str, int], tuple[str, int]]
    question: tuple[str, int]


class TrialRun:
    """One run, in the form of the report."""

    def __init__(self, runtime: Runtime, prompt: str, n_tokens: int, save_to: str | None = None) -> None:
        self.tokens: list[int] = []
        self.texts: list[str] = []
        started = time.monotonic()
        self.run = runtime.run(
            prompt,
            max_new_tokens=1 if save_to else ANSWER,
            sampling=GREEDY,
            save_to=save_to,
            on_token=self._take,
        )
        self.ms = 1000 * (time.monotonic() - started)
        self.n_tokens = n_tokens

    def _take(self, token: int, text: bytes) -> bool:
        self.tokens.append(token)
        self.texts.append(text.decode(errors="backslashreplace"))
        return True

    def report(self) -> Found:
        counts = msgspec.to_builtins(self.run)
        return {"our_prompt_tokens": self.n_tokens, "ms": round(self.ms), **counts}


def first_run(task: Task) -> Found:
    """Tests that both tokenizers agree, no template wraps the prompt, and the last run's prefix is reused."""
    started = time.monotonic()
    runtime = Runtime(task.model, task.options)
    load_ms = round(1000 * (time.monotonic() - started))
    cold, warm = (TrialRun(runtime, *_prompt(task, 0)) for _ in range(2))
    runtime.clear()
    cleared = TrialRun(runtime, *_prompt(task, 0))
    return {
        "load_ms": load_ms,
        "cold": cold.report(),
        "tokens": cold.tokens,
        "texts": cold.texts,
        "again": warm.report(),
        "after_clearing": cleared.report(),
        "our_tokens_are_counted": cold.run.prefill_tokens == cold.n_tokens,
        "memory_is_reused": _fewer(warm, cold),
        "same_text": cold.tokens == warm.tokens == cleared.tokens,
    }


def saved_and_restored(task: Task) -> Found:
    """Tests whether a state is written, how many tokens it claims to have, and whether it is used."""
    runtime = Runtime(task.model, task.options)
    cold = TrialRun(runtime, *_prompt(task, 0))
    runtime.clear()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "opening.rkllm_cache"
        saving = TrialRun(runtime, *task.openings[0], save_to=str(path))
        found = {"saving": saving.report(), "file_was_written": path.is_file()}
        if not path.is_file():
            return found
        head = path.read_bytes()[:12]
        runtime.close()
        runtime = Runtime(task.model, task.options)
        runtime.load_cache(str(path))
        warm = TrialRun(runtime, *_prompt(task, 0))
        return {
            **found,
            "file_bytes": path.stat().st_size,
            "file_head": head.hex(),
            "file_tokens": struct.unpack("<3I", head)[2] if len(head) == 12 else None,
            "cold": cold.report(),
            "restored": warm.report(),
            "state_is_used": _fewer(warm, cold),
            "same_text": warm.tokens == cold.tokens,
        }


def two_in_turn(task: Task) -> Found:
    """Tests whether two states can be loaded in turn, repeatedly."""
    runtime = Runtime(task.model, task.options)
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / f"{i}.rkllm_cache") for i in range(2)]
        for i, path in enumerate(paths):
            runtime.clear()
            TrialRun(runtime, *task.openings[i], save_to=path)
        rounds: list[Found] = []
        for i in (0, 1) * 3:
            started = time.monotonic()
            runtime.load_cache(paths[i])
            loaded_ms = round(1000 * (time.monotonic() - started))
            trial = TrialRun(runtime, *_prompt(task, i))
            rounds.append({"cache": i, "loaded_ms": loaded_ms, **trial.report(), "tokens_told": trial.tokens})
        return {"rounds": rounds, "model_loads": runtime.loads}


def aborted(task: Task) -> Found:
    """Tests when an abort during the prefill takes effect, and whether the next run is normal."""
    runtime = Runtime(task.model, task.options)
    cold = TrialRun(runtime, *_prompt(task, 0))
    runtime.clear()
    timer = threading.Timer(min(cold.ms / 4000, 1), runtime.abort)
    timer.start()
    cut = TrialRun(runtime, *_prompt(task, 0))
    timer.join()
    after = TrialRun(runtime, *_prompt(task, 0))
    same = after.tokens == cold.tokens
    return {"cold": cold.report(), "aborted": cut.report(), "after": after.report(), "same_text": same}


def loaded_after_abort(task: Task) -> Found:
    """Tests whether a state can be loaded right after a run that was aborted at its first token. This was
    reported to crash, so Headstart normally reloads the model before; this step doesn't."""
    runtime = Runtime(task.model, task.options)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "opening.rkllm_cache")
        TrialRun(runtime, *task.openings[0], save_to=path)
        text, _ = _prompt(task, 0)
        runtime.run(text, max_new_tokens=ANSWER, sampling=GREEDY, on_token=lambda token, piece: False)
        runtime.trust_abort()
        runtime.load_cache(path)
        return {"after": TrialRun(runtime, *_prompt(task, 0)).report(), "model_loads": runtime.loads}


STEPS: dict[str, Callable[[Task], Found]] = {
    "first_run": first_run,
    "saved_and_restored": saved_and_restored,
    "two_in_turn": two_in_turn,
    "aborted": aborted,
    "loaded_after_abort": loaded_after_abort,
}


def _prompt(task: Task, opening: int) -> tuple[str, int]:
    (text, n), (question, m) = task.openings[opening], task.question
    return text + question, n + m


def _fewer(warm: TrialRun, cold: TrialRun) -> bool | None:
    """Whether fewer tokens were evaluated; None if the runtime doesn't count them."""
    if warm.run.prefill_tokens is None or cold.run.prefill_tokens is None:
        return None
    return warm.run.prefill_tokens < cold.run.prefill_tokens


def main() -> None:
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    try:
        print(json.dumps(STEPS[task.step](task)))
    except ModelError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
