"""What was measured is remembered, never throws caches away silently, and is shown by `headstart doctor`."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from conftest import StartServer
from headstart.caches.entry import Content, Entry, Fingerprint
from headstart.cli.main import app
from headstart.config.settings import load_settings
from headstart.engine.kinds import engine_kind
from headstart.engine.tuning.constant import TOY
from headstart.engine.tuning.resolve import find_tuning
from headstart.model_files import embedded_model
from headstart.numerics import DEFAULT, Numerics
from headstart.protocol import EngineSettings
from headstart.service.models.cache_fit import numerics_of
from headstart.service.models.tuning_store import Doubted, Key, Remembered, Tunings
from headstart.service.service import Service
from servers import WITHOUT_STORE, RunningServer, running_server

PROMPT = "You keep the lighthouse. " * 20
TUNED = {"HEADSTART_TUNE": "true"}
CONVERTED = Numerics(flash_attention=False, weights="q8_0")


@asynccontextmanager
async def running(
    directory: Path, model: str = "toy:", **settings: Any
) -> AsyncIterator[tuple[Service, list[str]]]:
    """A service with a toy model, and what it said at its start."""
    said: list[str] = []
    flags = {"models": {"toy": model}, "cache_dir": directory, "tune": True, **settings}
    service = Service(load_settings(None, **flags), said.append)
    try:
        await service.load()
        yield service, said
    finally:
        await service.close()


async def with_cache(directory: Path, **settings: Any) -> None:
    async with running(directory, **settings) as (service, _):
        await service.caches.create(service.model("toy"), "keeper", Content(PROMPT))


async def start(directory: Path, **settings: Any) -> tuple[Any, list[str]]:
    """The tuning a start runs with, and what it said."""
    async with running(directory, **settings) as (service, said):
        return service.model("toy").engine.settings.tuning, said


def edit(directory: Path, **changes: Any) -> None:
    """Changes the last tuning in the file, so that it can be told from one measured anew."""
    content = json.loads((directory / "tuning.json").read_text())
    content["tunings"][-1]["tuning"] |= changes
    (directory / "tuning.json").write_text(json.dumps(content))


@pytest.mark.slow
async def test_a_second_start_takes_what_the_first_has_measured(tmp_path: Path) -> None:
    assert (await start(tmp_path))[0] == TOY
    edit(tmp_path, share_from=123)
    before = (tmp_path / "tuning.json").stat().st_mtime_ns
    tuning, _ = await start(tmp_path)
    assert tuning == msgspec.structs.replace(TOY, share_from=123)
    assert (tmp_path / "tuning.json").stat().st_mtime_ns == before
    assert stat.S_IMODE((tmp_path / "tuning.json").stat().st_mode) == 0o600


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"model": "toy:weights=other"}, {"threads": 1}])
async def test_other_weights_or_threads_are_measured_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    await start(tmp_path)
    edit(tmp_path, share_from=123)
    assert (await start(tmp_path, **change))[0] == TOY
    assert (await start(tmp_path))[0].share_from == 123


async def test_another_cpu_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await start(tmp_path)
    edit(tmp_path, share_from=123)
    monkeypatch.setattr("headstart.service.models.tuning_store.cpu_model", lambda: "Another CPU")
    assert (await start(tmp_path))[0] == TOY


async def test_without_tuning_nothing_is_measured_or_kept(tmp_path: Path) -> None:
    tuning, _ = await start(tmp_path, tune=False)
    assert tuning is None
    assert not (tmp_path / "tuning.json").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"tunings": [{"key": 1}]}', b"\xff\xfe"])
async def test_a_damaged_file_is_measured_again_with_a_warning(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tuning.json").write_bytes(content)
    assert (await start(tmp_path))[0] == TOY
    assert "tuning.json is damaged" in caplog.text
    assert [known.tuning for known in Tunings(tmp_path).all()] == [TOY]


async def test_a_file_that_can_not_be_read_or_written_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tuning.json").mkdir()
    assert (await start(tmp_path))[0] == TOY
    assert "can't be stored" in caplog.text


@pytest.mark.slow
async def test_what_is_set_wins_over_what_is_remembered(tmp_path: Path) -> None:
    await start(tmp_path)
    async with running(tmp_path, flash_attention=True) as (service, _):
        assert service.model("toy").fingerprint.settings["flash_attention"] == "on"
    async with running(tmp_path) as (service, _):
        assert service.model("toy").fingerprint.settings["flash_attention"] == "off"


@pytest.mark.slow
async def test_measuring_again_never_flips_the_flash_attention_of_caches(tmp_path: Path) -> None:
    await with_cache(tmp_path, flash_attention=True)
    (tmp_path / "tuning.json").unlink()
    async with running(tmp_path) as (service, said):
        (entry,) = service.caches.visible("", "toy")
        assert service.model("toy").fingerprint == entry.fingerprint
        assert entry.fingerprint.settings["flash_attention"] == "on"
    (line,) = said
    assert line.startswith("toy keeps flash attention on, as its caches were computed")
    assert "measuring prefers flash attention off" in line


@pytest.mark.slow
async def test_a_start_that_caches_do_not_fit_says_how_many_and_why(tmp_path: Path) -> None:
    await with_cache(tmp_path)
    _, said = await start(tmp_path, flash_attention=True)
    assert said == [
        "1 cache of toy no longer fits: flash attention is on, was off. Computed again at first use: keeper"
    ]
    _, said = await start(tmp_path, model="toy:weights=other")
    assert said == [
        "1 cache of toy no longer fits: the weights are others. Computed again at first use: keeper"
    ]
    assert (await start(tmp_path))[1] == []


@pytest.mark.slow
def test_a_server_says_what_no_longer_fits_before_it_answers(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    for i in range(7):
        server.create(f"keeper{i}", PROMPT)
    server.flags = ("--model", "toy=toy:", "--flash-attention")
    server.restart()
    log = server.log.read_text()
    told = log.index(
        "7 caches of toy no longer fit: flash attention is on, was off. Computed again at first use: "
    )
    assert "keeper4, and 2 more" in log
    assert told < log.index("listens on")
    answer = server.chat("Who?", use_cache="keeper3")
    assert answer["usage"]["cache_miss_reason"] == "settings_changed"
    assert server.chat("Who?", use_cache="keeper3")["usage"]["cache_hit"] is True


def test_every_difference_of_fingerprints_has_words() -> None:
    old = Fingerprint("w", "llama 1", {"flash_attention": "off", "kv_type": "f16"}, "t")
    new = Fingerprint("x", "llama 2", {"flash_attention": "on", "kv_streams": "4"}, "u")
    assert new.differences(old) == (
        "the weights are others; the engine is llama 2, was llama 1; flash attention is on, was off; "
        "kv streams is 4, was unset; kv type is unset, was f16; the chat template is another"
    )
    assert old.differences(old) == ""


def test_agreeing_to_one_arithmetic_ends_the_agreement_to_another(tmp_path: Path) -> None:
    tunings, key = Tunings(tmp_path), Key.here("w", "toy", 0)
    converted = msgspec.structs.replace(TOY, numerics=CONVERTED)
    tunings.put(key, TOY)
    tunings.put(key, converted, agreed=True)
    tunings.put(key, msgspec.structs.replace(converted, share_from=5))
    assert tunings.agreed(key) == CONVERTED
    found = tunings.find(key, CONVERTED)
    assert found
    assert found.share_from == 5
    tunings.put(key, TOY, agreed=True)
    assert [(known.tuning.numerics, known.agreed) for known in tunings.all()] == [
        (CONVERTED, False),
        (DEFAULT, True),
    ]


def test_what_was_measured_under_a_setting_is_not_taken_for_the_best_without_it(tmp_path: Path) -> None:
    tunings, key = Tunings(tmp_path), Key.here("w", "toy", 0)
    ranking = [CONVERTED, Numerics(True, "q8_0"), Numerics(True, "file"), DEFAULT]
    best = msgspec.structs.replace(TOY, numerics=CONVERTED, ranking=ranking)
    tunings.put(key, best)
    tunings.put(key, msgspec.structs.replace(best, numerics=ranking[2]))
    assert tunings.find(key, Numerics()) == best
    assert tunings.find(key, Numerics(flash_attention=True)) is None
    found = tunings.find(key, Numerics(True, "file"))
    assert found
    assert found.numerics == ranking[2]


@pytest.mark.slow
async def test_converted_weights_are_part_of_a_state_and_those_of_the_file_are_not_named(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as (service, _):
        assert service.model("toy").fingerprint.settings == {"flash_attention": "off"}
    async with running(tmp_path, weights="q8_0") as (service, _):
        assert service.model("toy").fingerprint.settings == {"flash_attention": "off", "weights": "q8_0"}


@pytest.mark.slow
@pytest.mark.parametrize("tune", [True, False])
async def test_the_weights_of_caches_are_kept_when_nothing_is_set(tmp_path: Path, tune: bool) -> None:
    await with_cache(tmp_path, weights="q8_0", flash_attention=True)
    (tmp_path / "tuning.json").unlink()
    async with running(tmp_path, tune=tune) as (service, said):
        (entry,) = service.caches.visible("", "toy")
        assert service.model("toy").fingerprint == entry.fingerprint
        assert entry.fingerprint.settings["weights"] == "q8_0"
    told = "toy keeps flash attention on and weights q8_0, as its caches were computed, though measuring"
    assert [line.startswith(told) for line in said] == ([True] if tune else [])


@pytest.mark.slow
async def test_what_is_set_of_a_pair_leaves_the_other_to_the_caches(tmp_path: Path) -> None:
    await with_cache(tmp_path, weights="q8_0")
    _, said = await start(tmp_path, flash_attention=True)
    assert said[-1] == (
        "1 cache of toy no longer fits: flash attention is on, was off. Computed again at first use: keeper"
    )


def test_most_caches_of_these_weights_decide() -> None:
    def entry(source: str, **kept: str) -> Entry:
        fingerprint = Fingerprint(source, "toy", kept, "t")
        return Entry("toy", "keeper", PROMPT, 1, 0, 0, fingerprint, {}, 0, 0)

    old, new = entry("w", flash_attention="off"), entry("w", flash_attention="off", weights="q8_0")
    others = [entry("x", flash_attention="on")] * 5
    assert numerics_of([old, new, new, *others], "w") == CONVERTED
    assert numerics_of([new, old, *others], "w") == DEFAULT
    assert numerics_of(others, "w") == Numerics()


def test_states_of_other_weights_are_built_again_and_the_answer_says_why(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    server.flags = ("--model", "toy=toy:", "--weights", "q8_0")
    server.restart()
    assert "the format of the weights is q8_0, was file" in server.log.read_text()
    assert server.chat("Who?", use_cache="keeper")["usage"]["cache_miss_reason"] == "settings_changed"
    assert server.chat("Who?", use_cache="keeper")["usage"]["cache_hit"] is True


def test_a_worker_whose_server_goes_away_stops_measuring() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs, pytest.raises(EOFError):
        find_tuning(EngineSettings("/absent.gguf", 1, 0, tune=True), theirs)


def test_a_measurement_that_fails_leaves_the_defaults(caplog: pytest.LogCaptureFixture) -> None:
    assert find_tuning(EngineSettings("/absent.gguf", 1, 0, tune=True)) is None
    assert "defaults are used" in caplog.text


# headstart doctor


def doctor(directory: Path, *arguments: str, model: str = "toy:", **env: str) -> Result:
    flags = ["doctor", "--cache-dir", str(directory), "--model", f"toy={model}", *arguments]
    return CliRunner().invoke(app, flags, env={**TUNED, "COLUMNS": "100", **env})


def report(directory: Path, *arguments: str, **more: str) -> dict[str, Any]:
    result = doctor(directory, "--json", *arguments, **more)
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (1 if found["problems"] else 0)
    return found


def in_force(model: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {setting["name"]: (setting["value"], setting["origin"]) for setting in model["settings"]}


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.rglob("*")}


def test_the_doctor_changes_nothing_and_works_beside_a_server(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:", env=TUNED | WITHOUT_STORE)
    server.create("keeper", PROMPT)
    before = snapshot(server.cache_dir)
    result = doctor(server.cache_dir)
    assert result.exit_code == 0, result.output
    assert snapshot(server.cache_dir) == before
    assert "Caches that fit: 1" in result.stdout
    assert "No problems found" in result.stdout
    assert server.http.get("/ready").status_code == 200


def test_the_doctor_needs_no_cache_directory(tmp_path: Path) -> None:
    result = doctor(tmp_path / "absent")
    assert result.exit_code == 0
    assert "measured at the first start" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
async def test_the_doctor_shows_settings_and_where_they_come_from(tmp_path: Path) -> None:
    caches = tmp_path / "caches"
    await start(caches)
    edit(caches, ubatch=32, measured={"20 tokens after 512, flash attention off": 88.4})
    config = tmp_path / "headstart.toml"
    config.write_text("slots = 3\n")
    arguments = ("--config", str(config), "--max-step-ms", "50")
    (model,) = report(caches, *arguments, HEADSTART_CTX="256")["models"]
    assert in_force(model) == {
        "flash_attention": ("off", "measured"),
        "weights": ("file", "measured"),
        "threads": ("1", "measured"),
        "prefill_chunk": ("32", "measured"),
        "share_from": ("256", "measured"),
        "max_step_ms": ("50", "flag"),
        "slots": ("3", "file"),
        "ctx": ("256", "environment"),
    }
    shown = doctor(caches).stdout
    assert "20 tokens after 512, flash attention off" in shown
    assert "88.4" in shown
    (model,) = report(caches, "--no-flash-attention", "--no-tune")["models"]
    assert in_force(model)["flash_attention"] == ("off", "flag")
    assert in_force(model)["prefill_chunk"] == ("64", "default")
    assert in_force(model)["weights"] == ("file", "default")
    (model,) = report(caches, "--weights", "q8_0")["models"]
    assert in_force(model)["weights"] == ("q8_0", "flag")


@pytest.mark.slow
async def test_the_doctor_counts_what_fits_and_says_why_others_do_not(tmp_path: Path) -> None:
    await with_cache(tmp_path)
    (model,) = report(tmp_path)["models"]
    assert (model["fitting"], model["misfits"]) == (1, {})
    (model,) = report(tmp_path, "--flash-attention")["models"]
    assert (model["fitting"], model["misfits"]) == (0, {"flash attention is on, was off": ["keeper"]})
    (model,) = report(tmp_path, model="toy:weights=other,template=fold")["models"]
    assert list(model["misfits"]) == ["the weights are others; the chat template is another"]
    result = CliRunner().invoke(
        app, ["doctor", "--cache-dir", str(tmp_path), "--model", "other=toy:"], env=TUNED
    )
    assert "1 caches of toy, which is no model here" in result.stdout


def test_a_model_that_is_missing_or_no_model_needs_attention(tmp_path: Path) -> None:
    (tmp_path / "rubbish.gguf").write_bytes(b"GGUF" + b"rubbish" * 100)
    for path in ("/absent.gguf", str(tmp_path / "rubbish.gguf"), str(tmp_path), "toy:nonsense=1"):
        result = doctor(tmp_path, model=path)
        assert result.exit_code == 1, path
        assert "Problem: toy: " in result.stdout


async def test_damaged_files_need_attention(tmp_path: Path) -> None:
    await with_cache(tmp_path)
    cache = tmp_path / "toy" / "keeper.headstart"
    (tmp_path / "toy" / "copy.headstart").write_bytes(cache.read_bytes())
    cache.write_bytes(cache.read_bytes()[:-1])
    (tmp_path / "tuning.json").write_text("{")
    misnamed, damaged, tuning = report(tmp_path)["problems"]
    assert "copy.headstart: holds the cache keeper of toy" in misnamed
    assert "keeper.headstart: " in damaged
    assert "tuning.json is damaged" in tuning


@pytest.mark.slow
async def test_measuring_again_keeps_the_flash_attention_of_caches_unless_agreed(tmp_path: Path) -> None:
    await with_cache(tmp_path, flash_attention=True)
    kept = doctor(tmp_path, "--measure")
    assert kept.exit_code == 0, kept.output
    assert "toy keeps flash attention on" in kept.stderr
    assert "If it were changed: 1 cache of toy no longer fits: flash attention is off, was on" in kept.stderr
    (model,) = report(tmp_path)["models"]
    assert in_force(model)["flash_attention"] == ("on", "its caches")
    assert (model["fitting"], len(model["notes"])) == (1, 1)
    changed = doctor(tmp_path, "--measure", "--yes")
    assert "1 cache of toy no longer fits: flash attention is off, was on" in changed.stderr
    (model,) = report(tmp_path)["models"]
    assert in_force(model)["flash_attention"] == ("off", "agreed to")
    _, said = await start(tmp_path)
    assert said == [
        "1 cache of toy no longer fits: flash attention is off, was on. Computed again at first use: keeper"
    ]


@pytest.mark.slow
async def test_measuring_again_keeps_the_weights_of_caches_unless_agreed(tmp_path: Path) -> None:
    await with_cache(tmp_path, weights="q8_0")
    kept = doctor(tmp_path, "--measure")
    assert "toy keeps weights q8_0" in kept.stderr
    told = "1 cache of toy no longer fits: the format of the weights is file, was q8_0"
    assert f"If it were changed: {told}" in kept.stderr
    (model,) = report(tmp_path)["models"]
    assert in_force(model)["weights"] == ("q8_0", "its caches")
    assert (model["fitting"], model["misfits"]) == (1, {})
    assert told in doctor(tmp_path, "--measure", "--yes").stderr
    (model,) = report(tmp_path)["models"]
    assert in_force(model)["weights"] == ("file", "agreed to")


def test_a_tuning_names_its_numerics_as_existing_files_do() -> None:
    record = msgspec.json.decode(msgspec.json.encode(TOY))
    assert record["arithmetic"] == {"flash_attention": False, "weights": "file"}
    assert "numerics" not in record
    assert msgspec.convert(record, type(TOY)) == TOY


def test_the_engine_is_named_as_states_name_it() -> None:
    kind = engine_kind("toy:")
    assert kind.load(EngineSettings("toy:", 1, 0, 1, 16)).info.engine == kind.version()


# With the real model


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that has measured its model. Measuring takes most of a minute of processor time."""
    with running_server(tmp_path_factory.mktemp("measured") / "cache", env=TUNED) as server:
        assert "Measuring the fastest settings for smollm2" in server.log.read_text()
        yield server


def only(server: RunningServer) -> Remembered | Doubted:
    """The one measurement that is remembered; beside other tests it may be in doubt."""
    content = Tunings(server.cache_dir)._read()
    known: list[Remembered | Doubted] = [*content.tunings, *content.doubted]
    assert len(known) == 1
    return known[0]


@pytest.mark.real_model
def test_a_real_model_is_measured_in_sane_figures(measured: RunningServer) -> None:
    tuning = only(measured).tuning
    assert 1 <= tuning.threads <= (os.cpu_count() or 1)
    assert tuning.ubatch in (16, 32, 64, 128, 256)
    assert tuning.pass_ms >= 0
    # On a busy machine either part may come out as nothing.
    assert tuning.token_ms + 1024 * tuning.attend_ms > 0
    assert tuning.attend_ms >= 0
    assert tuning.share_from % 64 == 0
    assert tuning.ranking[0] == tuning.numerics
    assert len(tuning.measured) >= 10
    assert all(ms > 0 for ms in tuning.measured.values())


@pytest.mark.real_model
def test_the_second_start_of_a_real_model_does_not_measure(measured: RunningServer) -> None:
    server = measured
    answer = server.chat("Who are you?", model="smollm2", max_tokens=4)
    assert answer["usage"]["completion_tokens"] > 0
    written = (server.cache_dir / "tuning.json").stat().st_mtime_ns
    server.restart()
    assert "Measuring" not in server.log.read_text()
    assert (server.cache_dir / "tuning.json").stat().st_mtime_ns == written
    assert only(server).key.engine == engine_kind(embedded_model()).version()
    server.create("keeper", PROMPT, model="smollm2")
    server.restart()
    result = CliRunner().invoke(app, ["doctor", "--json", "--cache-dir", str(server.cache_dir)], env=TUNED)
    assert result.exit_code == 0, result.output
    (model,) = json.loads(result.stdout)["models"]
    assert (model["fitting"], model["misfits"]) == (1, {})
    # Weights that were converted to be tried, and not chosen, are not kept.
    # They are where what was measured is in doubt: the next try needs them.
    if not model["doubted"]:
        assert (model["converted_bytes"] is not None) == (in_force(model)["weights"][0] == "q8_0")
