"""How the runtime is used, against the stand-in library in each layout, faults included."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headstart.engine.model import ModelError
from headstart.engine.rkllm import runtime as runtimes
from headstart.engine.rkllm.options import RuntimeOptions, checked
from headstart.engine.rkllm.run import Run
from headstart.engine.rkllm.runtime import Runtime, RuntimeLost
from headstart.protocol import Sampling
from rkllm_standin import RELEASES, standin, standin_model, standin_tokens

GREEDY = Sampling(temperature=0)
SYSTEM = "<|im_start|>system\nThe thing is to be brief, whatever others are doing.<|im_end|>\n"
OTHER = "<|im_start|>system\nAnother one, about defining things in the end.<|im_end|>\n"
QUESTION = "<|im_start|>user\nWhat is the use?<|im_end|>\n<|im_start|>assistant\n"

Start = Callable[..., Runtime]
Switch = Callable[[str], None]
pytestmark = pytest.mark.parametrize("version", RELEASES)


@pytest.fixture
def start(version: str, tmp_path: Path) -> Iterator[Start]:
    started = []

    def make(weights: str = "a", geometry: str = "1x1x8", **options: object) -> Runtime:
        model = standin_model(tmp_path / f"{weights}.rkllm", weights, geometry)
        settings = {"n_ctx": 512, "max_new_tokens": 100, "sampling": GREEDY, "cpus": 1, **options}
        started.append(Runtime(model, RuntimeOptions(standin(version), **settings)))  # type: ignore[arg-type]
        return started[-1]

    yield make
    for runtime in started:
        runtime.close()


@pytest.fixture
def switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Switch:
    """Sets the stand-in's fault switches for all calls that follow."""
    path = tmp_path / "switches"
    monkeypatch.setenv("RKLLM_STANDIN_FILE", str(path))
    path.write_text("")
    return lambda text: (path.write_text(text), None)[1]


class RecordedRun:
    """One run: its text, its tokens, and what the runtime said of it."""

    def __init__(
        self,
        runtime: Runtime,
        prompt: str,
        max_new_tokens: int = 20,
        sampling: Sampling = GREEDY,
        save_to: Path | None = None,
        keep_history: int = 0,
        on_token: Callable[[int, bytes], bool] = lambda token, text: True,
    ) -> None:
        self.tokens: list[int] = []
        self.pieces: list[bytes] = []
        self.threads: set[int] = set()
        self.on_token = on_token
        self.run: Run = runtime.run(
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            save_to=str(save_to) if save_to else None,
            keep_history=keep_history,
            on_token=self._take,
        )
        self.text = b"".join(self.pieces)

    def _take(self, token: int, text: bytes) -> bool:
        self.tokens.append(token)
        self.pieces.append(text)
        self.threads.add(threading.get_ident())
        return self.on_token(token, text)


def saved_tokens(path: Path) -> list[int]:
    data = path.read_bytes()
    (n,) = struct.unpack_from("<I", data, 8)
    return list(struct.unpack_from(f"<{n}i", data, 12))


def save(runtime: Runtime, prompt: str, path: Path) -> Path:
    RecordedRun(runtime, prompt, max_new_tokens=1, save_to=path)
    assert path.stat().st_size > 0
    return path


def test_a_run_tells_its_tokens_from_another_thread_and_what_it_counted(start: Start) -> None:
    runtime = start(max_new_tokens=10)
    asked = RecordedRun(runtime, SYSTEM + QUESTION, max_new_tokens=10)
    assert asked.text == bytes(asked.tokens)
    assert asked.threads != {threading.get_ident()}
    assert (asked.run.outcome, asked.run.tokens) == ("length", 10)
    if runtime.has_perf:
        assert asked.run.prefill_tokens == len(standin_tokens(SYSTEM + QUESTION))
        assert (asked.run.generated_tokens, asked.run.memory_mb) == (10, 123.5)
    else:
        assert asked.run == Run("length", 10)


def test_the_prompt_is_not_wrapped_by_the_models_template(start: Start, tmp_path: Path) -> None:
    runtime = start()
    path = save(runtime, SYSTEM, tmp_path / "saved")
    expected = standin_tokens(SYSTEM)
    assert saved_tokens(path)[: len(expected)] == expected


def test_an_answer_ends_by_itself(start: Start) -> None:
    runtime = start()
    asked = RecordedRun(runtime, "Hello", max_new_tokens=100)
    assert asked.run.outcome == "ended"
    assert asked.run.tokens == len(asked.tokens) < 100


def test_the_end_token_may_be_told_of_too(start: Start, switch: Switch) -> None:
    runtime = start()
    silent = RecordedRun(runtime, "Hello", max_new_tokens=100).tokens
    switch("eos=shown")
    told = RecordedRun(runtime, "Hello", max_new_tokens=100).tokens
    assert told == [*silent, *standin_tokens("<|im_end|>")]


def test_a_shorter_answer_than_was_set_at_the_start_is_ended_here(start: Start) -> None:
    runtime = start()
    assert runtime.per_request_sampling == (runtime.abi == "1.3.0")
    for n in (1, 2, 7):
        asked = RecordedRun(runtime, SYSTEM, max_new_tokens=n)
        assert (asked.run.outcome, len(asked.tokens)) == ("length", n)


def test_the_most_tokens_set_at_the_start_hold_before_1_3_0(start: Start) -> None:
    runtime = start(max_new_tokens=5)
    asked = RecordedRun(runtime, SYSTEM, max_new_tokens=20)
    assert asked.run.outcome == "length"
    assert len(asked.tokens) == (20 if runtime.per_request_sampling else 5)


def test_sampling_is_each_runs_own_from_1_3_0_and_the_starts_before(start: Start) -> None:
    warm = Sampling(temperature=0.9, repeat_penalty=1.2)
    runtime, warm_runtime = start(), start(sampling=warm)
    greedy = RecordedRun(runtime, SYSTEM).text
    own = RecordedRun(runtime, SYSTEM, sampling=warm).text
    by_start = RecordedRun(warm_runtime, SYSTEM, sampling=warm).text
    assert greedy != by_start
    assert own == (by_start if runtime.per_request_sampling else greedy)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0, top_p=0, top_k=0),
        Sampling(temperature=2, top_p=0, top_k=0, presence_penalty=-2, frequency_penalty=2),
        Sampling(temperature=1e-9, top_p=1, top_k=2**31 - 1, min_p=1, seed=1),
    ],
)
def test_extreme_sampling_parameters_are_brought_into_range(start: Start, sampling: Sampling) -> None:
    assert RecordedRun(start(sampling=sampling), SYSTEM, max_new_tokens=2, sampling=sampling).tokens


def test_characters_of_several_tokens_come_whole(start: Start, switch: Switch) -> None:
    runtime = start()
    switch("utf8=1")
    asked = RecordedRun(runtime, OTHER, max_new_tokens=60)
    assert bytes(asked.tokens).decode(errors="ignore").count("€") >= 1
    assert b"" in asked.pieces
    assert all(piece.decode() or not piece for piece in asked.pieces)
    switch("utf8=1,split=1")
    split = RecordedRun(runtime, OTHER, max_new_tokens=60)
    assert split.tokens == asked.tokens
    assert all(split.pieces)


def test_an_abort_from_a_callback_ends_the_run_after_its_late_end(start: Start, switch: Switch) -> None:
    runtime = start()
    switch("abort=slow,decode_ms=5")
    started = time.monotonic()
    asked = RecordedRun(runtime, SYSTEM, max_new_tokens=90, on_token=lambda token, text: token is None)
    assert time.monotonic() - started > 0.1
    assert (asked.run.outcome, asked.run.tokens, len(asked.tokens)) == ("aborted", 1, 1)
    switch("")
    assert RecordedRun(runtime, SYSTEM).run.outcome == "length"


@pytest.mark.parametrize("switches", ["prefill_ms=4", "prefill_ms=4,abort=lost"])
def test_an_abort_during_the_prefill_ends_it_once_that_is_done(
    start: Start, switch: Switch, switches: str
) -> None:
    runtime = start()
    switch(switches + ",decode_ms=10")
    timer = threading.Timer(0.05, runtime.abort)
    timer.start()
    started = time.monotonic()
    asked = RecordedRun(runtime, SYSTEM, max_new_tokens=90)
    timer.join()
    assert asked.run.outcome == "aborted"
    assert asked.tokens == []
    assert time.monotonic() - started < 0.9 + 0.004 * len(standin_tokens(SYSTEM))
    if runtime.has_perf:
        assert asked.run.prefill_tokens == len(standin_tokens(SYSTEM))


def test_an_abort_when_nothing_runs_changes_nothing(start: Start) -> None:
    runtime = start()
    runtime.abort()
    expected = RecordedRun(runtime, SYSTEM).text
    runtime.abort()
    assert RecordedRun(runtime, SYSTEM).text == expected


def test_what_a_callback_raises_is_raised_by_the_run(start: Start) -> None:
    runtime = start()

    def fail(token: int, text: bytes) -> bool:
        raise ValueError("from the callback")

    with pytest.raises(ValueError, match="from the callback"):
        RecordedRun(runtime, SYSTEM, on_token=fail)
    assert RecordedRun(runtime, SYSTEM).run.outcome == "length"


def test_a_run_that_returns_before_it_has_finished_is_waited_for(start: Start, switch: Switch) -> None:
    runtime = start()
    switch("late=200")
    started = time.monotonic()
    asked = RecordedRun(runtime, SYSTEM)
    assert time.monotonic() - started > 0.2
    assert asked.run.outcome == "length"


def test_a_model_is_freed_as_soon_as_a_run_that_returned_early_has_finished(
    start: Start, switch: Switch
) -> None:
    """The runtime's thread may still be on its way out then."""
    runtime = start()
    switch("late=20,leave=100")
    RecordedRun(runtime, SYSTEM)
    runtime.close()
    switch("")
    assert RecordedRun(start(), SYSTEM).tokens


LATE = """
import ctypes, gc, sys
from headstart.engine.rkllm.layouts import LAYOUTS
from headstart.engine.rkllm.options import RuntimeOptions
from headstart.engine.rkllm.runtime import Runtime
from headstart.protocol import Sampling
library, model = sys.argv[1:]
runtime = Runtime(model, RuntimeOptions(library, n_ctx=512, max_new_tokens=100, cpus=1))
runtime.run("Hello", max_new_tokens=3, sampling=Sampling(), on_token=lambda *token: True)
runtime.close()
kind = LAYOUTS[runtime.abi].callback
del runtime
gc.collect()
# These would take the memory of a callback that was collected.
others = [kind(lambda *_: print("another was called") or 0) for _ in range(100)]
ctypes.CDLL(library).standin_finish_again()
print("alive")
"""


def test_a_callback_after_the_model_was_freed_does_no_harm(version: str, tmp_path: Path) -> None:
    arguments = [standin(version), standin_model(tmp_path / "m.rkllm")]
    done = subprocess.run(
        [sys.executable, "-c", LATE, *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_a_run_that_never_finishes_is_given_up(
    start: Start, switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "FINISH_SECONDS", 0.2)
    runtime = start()
    switch("late=never")
    with pytest.raises(RuntimeLost, match="without finishing"):
        RecordedRun(runtime, SYSTEM)
    with pytest.raises(ModelError, match="isn't loaded any more"):
        RecordedRun(runtime, SYSTEM)
    runtime.close()


@pytest.mark.parametrize(
    ("switches", "why"), [("run=fail", "rkllm_run answered -1"), ("run=error", "failed")]
)
def test_a_run_that_fails_is_told_and_the_next_one_goes_on(
    start: Start, switch: Switch, switches: str, why: str
) -> None:
    runtime = start()
    expected = RecordedRun(runtime, SYSTEM).text
    switch(switches)
    with pytest.raises(ModelError, match=why):
        RecordedRun(runtime, SYSTEM)
    switch("")
    assert RecordedRun(runtime, SYSTEM).text == expected


@pytest.mark.parametrize(
    ("prompt", "why"),
    [("a\0b", "NUL"), ("\ud800", "UTF-8"), ("", "answered -1"), ("x" * 600, "answered -1")],
)
def test_prompts_that_can_not_be_run_are_refused(start: Start, prompt: str, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        RecordedRun(start(), prompt)


def test_the_last_runs_prefix_is_reused_and_with_history_kept_nothing_is(start: Start) -> None:
    runtime = start()
    cold = RecordedRun(runtime, SYSTEM + QUESTION)
    warm = RecordedRun(runtime, SYSTEM + QUESTION)
    assert warm.text == cold.text
    runtime.clear()
    cleared = RecordedRun(runtime, SYSTEM + QUESTION)
    assert cleared.text == cold.text
    appended = RecordedRun(runtime, SYSTEM + QUESTION, keep_history=1)
    assert appended.text != cold.text
    if runtime.has_perf:
        n = len(standin_tokens(SYSTEM + QUESTION))
        runs = (cold, warm, cleared, appended)
        assert [asked.run.prefill_tokens for asked in runs] == [n, 1, n, n]


def test_a_saved_cache_is_used_by_another_process_and_changes_nothing(start: Start, tmp_path: Path) -> None:
    first = start()
    path = save(first, SYSTEM, tmp_path / "saved")
    runtime = start()
    cold = RecordedRun(runtime, SYSTEM + QUESTION)
    runtime.clear()
    runtime.load_cache(str(path))
    warm = RecordedRun(runtime, SYSTEM + QUESTION)
    assert warm.text == cold.text
    if runtime.has_perf:
        assert warm.run.prefill_tokens == len(standin_tokens(QUESTION))


def test_switching_between_two_caches_works_again_and_again(start: Start, tmp_path: Path) -> None:
    runtime = start()
    openings = (SYSTEM, OTHER)
    paths = [save(runtime, text, tmp_path / str(i)) for i, text in enumerate(openings)]
    fresh = start()
    expected = [RecordedRun(fresh, opening + QUESTION).text for opening in openings]
    for _ in range(3):
        for opening, path, text in zip(openings, paths, expected, strict=True):
            runtime.load_cache(str(path))
            asked = RecordedRun(runtime, opening + QUESTION)
            assert asked.text == text
            if runtime.has_perf:
                assert asked.run.prefill_tokens == len(standin_tokens(QUESTION))
    runtime.release_cache()
    runtime.release_cache()


def test_the_model_is_loaded_again_between_an_abort_at_the_first_token_and_a_cache(
    start: Start, switch: Switch, tmp_path: Path
) -> None:
    """Else the runtime dies. Before 1.3.0 a save ends so."""
    runtime = start()
    switch("decode_ms=30")
    path = save(runtime, SYSTEM, tmp_path / "saved")
    runtime.load_cache(str(path))
    assert runtime.loads == (1 if runtime.per_request_sampling else 2)
    RecordedRun(runtime, SYSTEM + QUESTION, on_token=lambda token, text: False)
    loads = runtime.loads
    RecordedRun(runtime, SYSTEM + QUESTION)
    runtime.load_cache(str(path))
    assert runtime.loads == loads
    RecordedRun(runtime, SYSTEM + QUESTION, on_token=lambda token, text: False)
    runtime.load_cache(str(path))
    assert runtime.loads == loads + 1
    assert RecordedRun(runtime, SYSTEM + QUESTION).tokens


def test_files_that_are_no_cache_of_this_shape_are_refused(start: Start, tmp_path: Path) -> None:
    runtime = start()
    whole = save(runtime, SYSTEM, tmp_path / "saved").read_bytes()
    other = save(start("b", "2x1x8"), SYSTEM, tmp_path / "other")
    long = whole[:8] + struct.pack("<I", 513) + whole[12:]
    bad = {"empty": b"", "cut": whole[:-1], "head": whole[:10], "long": long, "magic": b"x" + whole[1:]}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    for name in (*bad, "missing", other.name):
        with pytest.raises(ModelError, match="rkllm_load_prompt_cache answered -1"):
            runtime.load_cache(str(tmp_path / name))
    runtime.load_cache(str(tmp_path / "saved"))


def test_another_models_file_of_the_same_shape_is_taken_and_makes_another_text(
    start: Start, tmp_path: Path
) -> None:
    """So the runtime can't be asked whose a file is."""
    runtime = start("a")
    expected = RecordedRun(runtime, SYSTEM + QUESTION).text
    runtime.clear()
    runtime.load_cache(str(save(start("b"), SYSTEM, tmp_path / "other")))
    assert RecordedRun(runtime, SYSTEM + QUESTION).text != expected


def test_a_save_that_was_skipped_or_cut_short_is_seen_by_the_file_alone(
    start: Start, switch: Switch, tmp_path: Path
) -> None:
    runtime = start()
    switch("save=skip")
    RecordedRun(runtime, SYSTEM, max_new_tokens=1, save_to=tmp_path / "skipped")
    assert not (tmp_path / "skipped").exists()
    switch("save=partial")
    partial = save(runtime, SYSTEM, tmp_path / "partial")
    switch("")
    runtime.clear()
    with pytest.raises(ModelError, match="answered -1"):
        runtime.load_cache(str(partial))


@pytest.mark.parametrize("call", ["load", "release"])
def test_a_cache_call_that_fails_is_told(start: Start, switch: Switch, tmp_path: Path, call: str) -> None:
    runtime = start()
    path = str(save(runtime, SYSTEM, tmp_path / "saved"))
    runtime.load_cache(path)
    switch(f"{call}=fail")
    with pytest.raises(ModelError, match=f"rkllm_{call}_prompt_cache answered -1"):
        runtime.load_cache(path)


@pytest.mark.parametrize(
    ("switches", "why"), [("init=fail", "rkllm_init"), ("template=fail", "chat_template")]
)
def test_a_start_that_fails_is_told(start: Start, switch: Switch, switches: str, why: str) -> None:
    switch(switches)
    with pytest.raises(ModelError, match=f"{why} answered -1"):
        start()


CRASHING = """
import sys
from headstart.engine.rkllm.options import RuntimeOptions
from headstart.engine.rkllm.runtime import Runtime
from headstart.protocol import Sampling
library, model, saved = sys.argv[1:]
runtime = Runtime(model, RuntimeOptions(library, n_ctx=512, max_new_tokens=100, cpus=1))
runtime.run("Hello", max_new_tokens=3, sampling=Sampling(), save_to=saved, on_token=lambda *token: True)
runtime.load_cache(saved)
print("alive")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "switches", ["", *(f"{at}=crash" for at in ("init", "run", "decode", "save", "load"))]
)
def test_a_crash_of_the_runtime_is_one_of_its_process(version: str, tmp_path: Path, switches: str) -> None:
    arguments = [standin(version), standin_model(tmp_path / "m.rkllm"), str(tmp_path / "saved")]
    done = subprocess.run(
        [sys.executable, "-c", CRASHING, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "RKLLM_STANDIN": switches},
    )
    assert done.returncode == (-signal.SIGSEGV if switches else 0), done.stderr
    assert ("alive" in done.stdout) == (not switches)


def test_a_null_image_token_kills_the_stand_in_as_it_would_the_runtime(
    start: Start, version: str, tmp_path: Path
) -> None:
    """Which is why they are set: the library's own defaults for them are null."""
    code = CRASHING.replace(
        "from headstart.protocol",
        "from headstart.engine.rkllm import layouts, library\n"
        "default = library.Library.default_param\n"
        "class Careless:\n"
        "    def __init__(self, param): self.__dict__['param'] = param\n"
        "    def __getattr__(self, name): return getattr(self.param, name)\n"
        "    def __setattr__(self, name, value):\n"
        "        if not name.startswith('img_'): setattr(self.param, name, value)\n"
        "library.Library.default_param = lambda self: Careless(default(self))\n"
        "init = library.Library.init\n"
        "library.Library.init = lambda self, param, callback: init(self, param.param, callback)\n"
        "from headstart.protocol",
    )
    arguments = [standin(version), standin_model(tmp_path / "m.rkllm"), str(tmp_path / "saved")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False)
    assert done.returncode == (0 if version == "1.3.0" else -signal.SIGSEGV), done.stderr


def test_the_log_level_reaches_the_runtime(version: str, tmp_path: Path) -> None:
    code = CRASHING.replace("cpus=1", "cpus=1, log_level=2")
    arguments = [standin(version), standin_model(tmp_path / "m.rkllm"), str(tmp_path / "saved")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert "log level 2" in done.stderr


def test_a_model_of_another_kind_is_refused(version: str, tmp_path: Path) -> None:
    model = tmp_path / "model.rkllm"
    model.write_bytes(b"GGUF" * 10)
    with pytest.raises(ModelError, match="rkllm_init answered -1"):
        Runtime(str(model), RuntimeOptions(standin(version), n_ctx=512, max_new_tokens=10, cpus=1))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"n_ctx": 1000}, "multiple of 32"),
        ({"n_ctx": 0}, "multiple of 32"),
        ({"n_ctx": 16416}, "at most 16384"),
        ({"max_new_tokens": 0}, "from 1 to the context's"),
        ({"max_new_tokens": 600}, "from 1 to the context's 512"),
        ({"cpu_mask": 1 << 40}, "names CPUs that aren't there"),
        ({"cpu_mask": 0x30, "cpus": 3}, "doesn't name 3 CPUs"),
        ({"cpus": -1}, "from 1 to"),
        ({"cpus": 9}, "from 1 to"),
    ],
)
def test_options_are_checked_before_the_runtime_sees_them(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, int], why: str
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    model = standin_model(tmp_path / "m.rkllm")
    settings = {"n_ctx": 512, "max_new_tokens": 100, **options}
    with pytest.raises(ModelError, match=why):
        checked(model, RuntimeOptions(standin(version), **settings))  # type: ignore[arg-type]


def test_the_fast_cores_are_taken_where_nothing_is_set(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = standin_model(tmp_path / "m.rkllm"), RuntimeOptions(standin(version))
    for there, cpus, mask in ((8, 4, 0xF0), (4, 4, 0xF), (2, 2, 0b11)):
        monkeypatch.setattr(os, "cpu_count", lambda n=there: n)
        assert (checked(model, options).cpus, checked(model, options).cpu_mask) == (cpus, mask)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert checked(model, RuntimeOptions(cpus=2)).cpu_mask == 0b1100_0000
    assert checked(model, RuntimeOptions(cpu_mask=0x3F)).cpus == 6


def test_a_model_file_that_is_missing_empty_or_a_folder_is_told(version: str, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    cases = {"missing": "can't be read", "empty": "is empty", "": "is not a file"}
    for name, why in cases.items():
        with pytest.raises(ModelError, match=why):
            checked(str(tmp_path / name), RuntimeOptions(standin(version)))
