"""What was measured while the machine did other work is noticed, told, not run with, and measured again."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from headstart.caches.entry import Content
from headstart.cli.main import app
from headstart.config.settings import load_settings
from headstart.engine.trials import TrialShape
from headstart.engine.tuning import machine_load
from headstart.engine.tuning.constant import TOY
from headstart.engine.tuning.machine_load import Spent, Watch
from headstart.engine.tuning.measure import measure
from headstart.engine.tuning.resolve import resolved
from headstart.numerics import DEFAULT, MOST_TRIES, Numerics, Tuning, preferred
from headstart.protocol import EngineSettings
from headstart.service.models.tuning_store import Key, Tunings
from headstart.service.service import Service
from servers import RunningServer, running_server
from trials import Calm, Cost, FakeTrials

MODEL = EngineSettings("m", 0, 0)
ATTENTION = Numerics(flash_attention=True, weights="file")
PROMPT = "You keep the lighthouse. " * 20


def cost(shape: TrialShape, threads: int, n: int, depth: int) -> float:
    """Flash attention costs a fifth more."""
    return (6.0 + n * (4.0 + depth * 0.002)) * (1.2 if shape.numerics.flash_attention else 1)


class Bursts(Calm):
    """Other work that no kernel tells of: it comes with the first pause and goes with the next."""

    factor = 1.0

    def pause(self) -> None:
        super().pause()
        self.factor = 1.6 if self.factor == 1 else 1.0


def noisy(watch: Bursts, of: Cost = cost) -> FakeTrials:
    return FakeTrials(lambda *call: of(*call) * watch.factor, watch=watch)


def test_a_quiet_machine_is_measured_once_and_surely() -> None:
    trials = FakeTrials(cost)
    tuning = measure(MODEL, trials)
    assert tuning.is_sure
    assert (tuning.tries, tuning.doubts) == (1, {})
    assert isinstance(trials.watch, Calm)
    assert trials.watch.pauses


def test_figures_that_do_not_agree_are_doubted_one_by_one() -> None:
    tuning = measure(MODEL, noisy(Bursts()))
    assert not tuning.is_sure
    assert not tuning.counts
    assert set(tuning.doubts) <= set(tuning.measured)
    assert "differ by 60 %" in tuning.doubt


def test_a_difference_that_any_machine_has_is_no_doubt() -> None:
    watch = Bursts()
    slightly = FakeTrials(lambda *call: cost(*call) * (1.08 if watch.factor > 1 else 1), watch=watch)
    assert measure(MODEL, slightly).is_sure


def test_steady_work_of_others_is_a_doubt_though_the_times_agree() -> None:
    tuning = measure(MODEL, FakeTrials(cost, watch=Calm(doing=1.5)))
    assert set(tuning.doubts) == set(tuning.measured)
    assert "other programs used 1.5 CPUs" in tuning.doubt
    assert measure(MODEL, FakeTrials(cost, watch=Calm(doing=0.1))).is_sure


@pytest.mark.parametrize(
    ("now", "doubt"),
    [
        (Spent(10, 0.5, 0, 0), ""),
        (Spent(10, 20, 0, 0), "other programs used 2.0 CPUs"),
        (Spent(10, 0, 5, 0), "other machines on this one used 0.5 of its CPUs"),
        (Spent(10, 0, 0, 4), "programs waited for a CPU 40 % of the time"),
        (Spent(0.1, 20, 20, 20), ""),
    ],
)
def test_what_else_the_machine_did_is_told_in_words(now: Spent, doubt: str) -> None:
    looks = iter([Spent(0.0), now])
    assert Watch(lambda: next(looks)).doubt() == doubt


def test_a_machine_that_tells_nothing_is_no_doubt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_load, "STATISTICS", tmp_path / "none")
    monkeypatch.setattr(machine_load, "PRESSURE", tmp_path / "none")
    watch = Watch()
    watch._begun = watch._begun._replace(clock=watch._begun.clock - 10)
    assert watch.doubt() == ""
    (tmp_path / "none").write_text("cpu0 a b\nsome nonsense\n")
    assert watch.doubt() == ""


def test_what_is_in_doubt_is_not_run_with_until_there_were_five_tries() -> None:
    doubted = msgspec.structs.replace(TOY, threads=3, ubatch=16, numerics=ATTENTION, doubts={"a": "b"})
    safe = resolved(MODEL, doubted)
    assert safe == resolved(MODEL, None)
    assert (safe.numerics, safe.prefill_chunk) == (DEFAULT, 64)
    last = msgspec.structs.replace(doubted, tries=MOST_TRIES)
    assert resolved(MODEL, last).numerics == ATTENTION
    assert not last.is_sure


def test_after_five_tries_the_best_figures_of_all_count() -> None:
    """Each try is hurt in another place: none of them alone tells which arithmetic is best."""
    hurt = 0

    def one_hurt(shape: TrialShape, threads: int, n: int, depth: int) -> float:
        without = not shape.numerics.flash_attention
        return cost(shape, threads, n, depth) * (2.0 if hurt != 1 and without else 1.0)

    tuning: Tuning | None = None
    for hurt in range(MOST_TRIES):
        trials = FakeTrials(one_hurt, watch=Calm(doing=1))
        tuning = measure(msgspec.structs.replace(MODEL, tried=tuning), trials)
        assert tuning.tries == hurt + 1
        assert tuning.counts == (tuning.tries == MOST_TRIES)
        assert tuning.numerics == (ATTENTION if hurt == 0 else DEFAULT)
    assert tuning
    assert tuning.doubts


def test_a_try_that_agrees_with_itself_counts_alone() -> None:
    tried = msgspec.structs.replace(TOY, doubts={"a": "b"}, measured={})
    lying = dict.fromkeys(measure(MODEL, FakeTrials(cost)).measured, 0.01)
    tried = msgspec.structs.replace(tried, measured=lying)
    assert measure(msgspec.structs.replace(MODEL, tried=tried), FakeTrials(cost)).measured != lying


@pytest.mark.parametrize(("factor", "chosen"), [(1.05, ATTENTION), (1.2, DEFAULT)])
def test_caches_keep_their_arithmetic_unless_another_saves_a_tenth(factor: float, chosen: Numerics) -> None:
    def slower(shape: TrialShape, threads: int, n: int, depth: int) -> float:
        return (6.0 + n * 4.0) * (factor if shape.numerics.flash_attention else 1)

    asked = msgspec.structs.replace(MODEL, existing=ATTENTION)
    tuning = measure(asked, FakeTrials(slower))
    assert tuning.numerics == chosen
    assert tuning.ranking[0] == DEFAULT
    assert preferred({DEFAULT: 90.0, ATTENTION: 100.0}, Numerics(), ATTENTION) == DEFAULT


# tuning.json

KEY = Key.here("w", "toy", 0)


def remembered(directory: Path, tuning: Tuning) -> Tunings:
    tunings = Tunings(directory)
    tunings.put(KEY, tuning)
    return tunings


def doubting(tries: int = 1, **changes: Any) -> Tuning:
    return msgspec.structs.replace(TOY, tries=tries, doubts={"1 token": "busy"}, **changes)


def test_what_is_in_doubt_is_kept_for_the_next_try_only(tmp_path: Path) -> None:
    tunings = remembered(tmp_path, doubting())
    assert tunings.find(KEY, Numerics()) is None
    assert tunings.doubted(KEY) == doubting()
    tunings.put(KEY, doubting(2))
    assert tunings.doubted(KEY) == doubting(2)
    tunings.put(KEY, TOY)
    assert (tunings.find(KEY, Numerics()), tunings.doubted(KEY)) == (TOY, None)


def test_the_fifth_try_counts_and_stays_marked(tmp_path: Path) -> None:
    tunings = remembered(tmp_path, doubting(4))
    tunings.put(KEY, doubting(5))
    found = tunings.find(KEY, Numerics())
    assert found
    assert (found.is_sure, found.is_final) == (False, True)
    assert tunings.doubted(KEY) is None


def test_what_the_last_release_wrote_is_used_and_to_be_measured_again(tmp_path: Path) -> None:
    remembered(tmp_path, TOY)
    old = json.loads((tmp_path / "tuning.json").read_text())
    del old["doubted"], old["tunings"][0]["overrides"]
    for name in ("hits", "tries", "doubts"):
        del old["tunings"][0]["tuning"][name]
    (tmp_path / "tuning.json").write_text(json.dumps(old))
    found = Tunings(tmp_path).find(KEY, Numerics())
    assert found
    assert found.counts
    assert not found.is_final
    # Another try that is in doubt doesn't take its place.
    Tunings(tmp_path).put(KEY, doubting())
    assert Tunings(tmp_path).find(KEY, Numerics()) == found


HOSTILE: dict[str, Any] = {
    "threads": [0, -1, 10**9, 1.5, "2", None],
    "ubatch": [0, -64, 4097, 2**63, 2**70],
    "pass_ms": [-1, 1e300, "1", None],
    "token_ms": [-0.5, 1e12],
    "attend_ms": [-1, 1e12],
    "share_from": [-1, 2**40],
    "ranking": [[{"flash_attention": None, "weights": None}], [{"weights": "q2"}], 5, [[]] * 30],
    "arithmetic": [{}, {"flash_attention": True, "weights": None}, {"flash_attention": 1, "weights": "file"}],
    "measured": [{"a": -1}, {"a": 1e300}, {"\u001b[31m": 1.0}, []],
    "hits": [[1.0], [-1.0] * 4, 3],
    "tries": [-1, 10**6, "1"],
    "doubts": [{"a": 1}, {"a": "\u001b]0;x\u0007"}, {"\n": "b"}],
}


def damages() -> list[tuple[str, Any]]:
    return [(name, value) for name, values in HOSTILE.items() for value in values]


@pytest.mark.parametrize(("name", "value"), damages())
def test_impossible_values_are_damage_that_costs_a_measurement(tmp_path: Path, name: str, value: Any) -> None:
    tunings = remembered(tmp_path, TOY)
    content = json.loads((tmp_path / "tuning.json").read_text())
    content["tunings"][0]["tuning"][name] = value
    (tmp_path / "tuning.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is damaged"):
        tunings.all()
    assert tunings.find(KEY, Numerics()) is None
    tunings.put(KEY, TOY)
    assert tunings.find(KEY, Numerics()) == TOY


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a named pipe": make_pipe,
    "a directory": Path.mkdir,
    "a socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "a link to nothing": lambda path: path.symlink_to("/absent"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "deep": lambda path: path.write_text('{"tunings": [], "x": ' + "[" * 200_000),
    "large": lambda path: path.write_bytes(b" " * (5 << 20)),
    "infinite": lambda path: path.write_text('{"tunings": [], "doubted": [{"measured": 1e999}]}'),
    "no number": lambda path: path.write_text('{"tunings": [], "doubted": [{"measured": NaN}]}'),
    "no text": lambda path: path.write_bytes(b'{"tunings": [], "\xff": 1}'),
}


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_file_that_is_none_never_costs_a_start(tmp_path: Path, what: str) -> None:
    DAMAGES[what](tmp_path / "tuning.json")
    tunings = Tunings(tmp_path)
    assert tunings.find(KEY, Numerics()) is None
    assert tunings.doubted(KEY) is None
    tunings.put(KEY, TOY)


def test_threads_that_this_machine_does_not_have_are_not_used(tmp_path: Path) -> None:
    tunings = remembered(tmp_path, msgspec.structs.replace(TOY, threads=4096))
    assert tunings.find(KEY, Numerics()) is None


# A server

IDLE = 0.05


@asynccontextmanager
async def running(directory: Path, model: str, **more: Any) -> AsyncIterator[tuple[Service, list[str]]]:
    said: list[str] = []
    flags = {
        "models": {"toy": model},
        "cache_dir": directory,
        "tune": True,
        "tune_idle_seconds": IDLE,
        **more,
    }
    service = Service(load_settings(None, **flags), said.append)
    try:
        await service.load()
        yield service, said
    finally:
        await service.close()


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.01)


@pytest.mark.slow
async def test_a_start_in_doubt_says_so_and_serves_with_safe_defaults(tmp_path: Path) -> None:
    async with running(tmp_path, "toy:busy=9,attention=1", tune_idle_seconds=0) as (service, said):
        assert service.model("toy").fingerprint.settings == {"flash_attention": "off"}
    (line,) = said
    assert "toy was measured once, and what was found can't be relied on" in line
    assert "other programs used 2.0 CPUs" in line
    assert "safe defaults" in line
    # The next start doesn't measure, and serves in the same way.
    async with running(tmp_path, "toy:busy=9,attention=1", tune_idle_seconds=0) as (service, said):
        assert service.model("toy").engine.settings.tuning is None
        assert service.model("toy").fingerprint.settings == {"flash_attention": "off"}
    assert "measured once" in said[0]


@pytest.mark.slow
async def test_an_idle_server_measures_again_and_computes_caches_again_where_it_pays(tmp_path: Path) -> None:
    model = "toy:busy=1,attention=1"
    async with running(tmp_path, model, tune_idle_seconds=0) as (service, _):
        await service.caches.create(service.model("toy"), "keeper", Content(PROMPT))
    async with running(tmp_path, model) as (service, said):
        await until(lambda: any("measured again, and" in line for line in said))
        (line,) = [line for line in said if "measured again, and" in line]
        assert "what was found is sure: it runs with flash attention on" in line
        assert "1 cache of it are computed again" in line
        await until(lambda: _arithmetic(service) == {"on"})
        assert service.model("toy").fingerprint.settings["flash_attention"] == "on"
        (known,) = Tunings(tmp_path).all()
        assert known.tuning.is_sure
        assert known.tuning.tries == 2
    async with running(tmp_path, model) as (service, said):
        assert said == []
        assert service.model("toy").fingerprint.settings["flash_attention"] == "on"


def _arithmetic(service: Service) -> set[str]:
    return {entry.fingerprint.settings["flash_attention"] for entry in service.caches.visible("")}


@pytest.mark.slow
async def test_what_is_set_or_agreed_to_is_never_changed_by_another_try(tmp_path: Path) -> None:
    model = "toy:busy=1,attention=1"
    async with running(tmp_path, model, flash_attention=False) as (service, said):
        await service.caches.create(service.model("toy"), "keeper", Content(PROMPT))
        await until(lambda: any("measured again, and" in line for line in said))
        await until(lambda: service.model("toy").engine.state == "ready")
        assert _arithmetic(service) == {"off"}


@pytest.mark.slow
async def test_a_measurement_of_the_last_release_is_made_again_once_when_idle(tmp_path: Path) -> None:
    async with running(tmp_path, "toy:", tune_idle_seconds=0):
        pass
    content = json.loads((tmp_path / "tuning.json").read_text())
    del content["tunings"][0]["tuning"]["tries"]
    (tmp_path / "tuning.json").write_text(json.dumps(content))
    async with running(tmp_path, "toy:") as (_, said):
        await until(lambda: any("measured again, and" in line for line in said))
    (known,) = Tunings(tmp_path).all()
    assert known.tuning.is_sure


class Slow:
    """A measurement that lasts until its channel is closed."""

    def __init__(self) -> None:
        self.begun = 0
        self.stopped = 0

    def __call__(self, settings: EngineSettings, channel: socket.socket, env: Any) -> Tuning:
        self.begun += 1
        assert channel.recv(1) == b""
        self.stopped += 1
        raise EOFError


async def test_a_request_ends_a_measurement_at_once_and_the_next_one_waits_longer(tmp_path: Path) -> None:
    slow = Slow()
    async with running(tmp_path, "toy:busy=9", tune_idle_seconds=0) as (service, _):
        service._remeasuring.measure = slow
        service._remeasuring.idle_seconds = IDLE
        service._remeasuring.start()
        await until(lambda: slow.begun == 1)
        first = service._remeasuring._not_before["toy"]
        async with service.models.use(service.model("toy")):
            await until(lambda: slow.stopped == 1)
        await until(lambda: slow.begun == 2)
        assert service._remeasuring._not_before["toy"] - time.monotonic() > first - time.monotonic()
        assert Tunings(tmp_path).doubted(Tunings(tmp_path)._read().doubted[0].key)
    assert slow.stopped == 2


@pytest.mark.slow
async def test_five_tries_are_the_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.service.caching.remeasure.BACK_OFF", 1)
    async with running(tmp_path, "toy:busy=99") as (service, said):
        await until(lambda: any("the best figures of all tries count, unsure" in line for line in said))
        (known,) = Tunings(tmp_path).all()
        assert known.tuning.tries == MOST_TRIES
        await until(lambda: service.model("toy").engine.state == "ready")
        assert service.model("toy").served.plan(service._store).again is None


@pytest.fixture
def busy_server(tmp_path: Path) -> Any:
    flags = ("--model", "toy=toy:busy=1,attention=1")
    env = {"HEADSTART_TUNE": "true", "HEADSTART_TUNE_IDLE_SECONDS": "2"}
    with running_server(tmp_path / "cache", *flags, env=env) as server:
        yield server


@pytest.mark.slow
def test_requests_are_answered_while_a_model_is_measured_and_loaded_again(busy_server: RunningServer) -> None:
    assert "can't be relied on" in busy_server.log.read_text()
    busy_server.create("keeper", PROMPT)
    deadline = time.monotonic() + 60
    while "computed again" not in busy_server.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for _ in range(5):
        assert busy_server.chat("Who?", use_cache="keeper")["usage"]["completion_tokens"] > 0
    assert busy_server.chat("Who?", use_cache="keeper")["usage"]["cache_hit"] is True


@pytest.mark.slow
async def test_the_doctor_tells_how_sure_each_figure_is(tmp_path: Path) -> None:
    async with running(tmp_path, "toy:busy=9", tune_idle_seconds=0):
        pass
    content = json.loads((tmp_path / "tuning.json").read_text())
    content["doubted"][0]["tuning"]["measured"] = {"1 token": 5.0, "20 tokens": 50.0}
    (tmp_path / "tuning.json").write_text(json.dumps(content))
    flags = ["doctor", "--cache-dir", str(tmp_path), "--model", "toy=toy:busy=9"]
    result = CliRunner().invoke(app, flags, env={"HEADSTART_TUNE": "true", "COLUMNS": "110"})
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert any("1 token" in line and "unsure: other programs used 2.0 CPUs" in line for line in lines)
    assert any("20 tokens" in line and line.rstrip().endswith("sure") for line in lines)
    assert "can't be relied on" in result.stdout
