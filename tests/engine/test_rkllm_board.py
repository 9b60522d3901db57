"""`headstart doctor` on a board with Rockchip's NPU: boards are folders, the runtime is the stand-in."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from headstart.cli.main import app
from headstart.doctor import board as boards
from headstart.doctor.board import examine_board, has_npu
from headstart.engine.rkllm.first_checks import STEPS
from headstart.protocol import RkllmSettings
from rkllm_models import tokenizer_files
from rkllm_standin import RELEASES, standin, standin_model

ORANGE_PI = {
    "proc/device-tree/model": "Orange Pi 5\0",
    "proc/device-tree/compatible": "rockchip,rk3588s-orangepi-5\0rockchip,rk3588\0",
    "proc/meminfo": "MemTotal:       16000000 kB\nMemAvailable:   12000000 kB\n",
    "sys/kernel/debug/rknpu/version": "RKNPU driver: v0.9.8\n",
    "sys/class/devfreq/fdab0000.npu/cur_freq": "300000000\n",
    "sys/class/devfreq/fdab0000.npu/max_freq": "1000000000\n",
    "sys/class/devfreq/fdab0000.npu/governor": "rknpu_ondemand\n",
    "sys/class/devfreq/fb000000.gpu/governor": "simple_ondemand\n",
}


def orange_pi(root: Path, **files: str | None) -> Path:
    for name, content in (ORANGE_PI | files).items():
        if content is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content)
    return root


def doctor(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments], env=env)


@pytest.fixture
def model(tmp_path: Path) -> str:
    tokenizer_files(tmp_path)
    return standin_model(tmp_path / "model.rkllm")


def flags(model: str, tmp_path: Path, release: str) -> list[str]:
    return [
        "--model",
        f"qwen={model}",
        "--cache-dir",
        str(tmp_path / "cache"),
        "--rkllm-library",
        standin(release),
    ]


def test_a_board_tells_its_chip_driver_frequency_and_memory(tmp_path: Path) -> None:
    board = examine_board(RkllmSettings(library=standin("1.2.3")), orange_pi(tmp_path))
    assert (board.name, board.chip, board.driver) == ("Orange Pi 5", "rk3588", "0.9.8")
    assert (board.npu_mhz, board.npu_max_mhz, board.governor) == (300, 1000, "rknpu_ondemand")
    assert board.available_bytes == 12_000_000 * 1024
    assert board.runtime is not None
    assert (board.runtime.version, board.runtime.abi) == ("1.2.3", "1.2.1")
    assert board.problems == []
    assert has_npu(tmp_path)


def test_a_frequency_that_follows_the_load_is_noted_with_what_fixes_it(tmp_path: Path) -> None:
    given = RkllmSettings(library=standin("1.3.0"))
    (note,) = [line for line in examine_board(given, orange_pi(tmp_path)).notes if "frequency" in line]
    assert "echo performance > /sys/class/devfreq/fdab0000.npu/governor" in note
    orange_pi(tmp_path, **{"sys/class/devfreq/fdab0000.npu/governor": "performance\n"})
    assert not any("frequency" in line for line in examine_board(given, tmp_path).notes)


def test_a_driver_that_only_root_can_see_is_looked_for_elsewhere_or_noted(tmp_path: Path) -> None:
    hidden = {"sys/kernel/debug/rknpu/version": None}
    board = examine_board(RkllmSettings(library=standin("1.3.0")), orange_pi(tmp_path, **hidden))
    assert board.driver is None
    assert any("as root" in line for line in board.notes)
    orange_pi(tmp_path, **hidden, **{"proc/rknpu/version": "RKNPU driver: v0.9.6"})
    assert examine_board(RkllmSettings(library=standin("1.3.0")), tmp_path).driver == "0.9.6"


def test_few_open_files_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = RkllmSettings(library=standin("1.3.0"))
    for limit, noted in ((1024, True), (102400, False)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, n=limit: (n, n))
        board = examine_board(given, orange_pi(tmp_path))
        assert board.open_files == limit
        assert any("ulimit -n" in line for line in board.notes) is noted


def test_a_machine_without_an_npu_fails_at_nothing(tmp_path: Path) -> None:
    board = examine_board(RkllmSettings(library="/nowhere/librkllmrt.so"), tmp_path)
    assert (board.chip, board.driver, board.npu_mhz, board.runtime) == (None, None, None, None)
    assert board.problems == ["the NPU runtime is missing: /nowhere/librkllmrt.so"]
    assert not has_npu(tmp_path)


def test_a_runtime_that_crashes_when_loaded_takes_nothing_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -SEGV $$\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    board = examine_board(RkllmSettings(library=standin("1.3.0")), tmp_path)
    assert board.problems == ["the NPU runtime crashes when it is loaded (signal 11)"]


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_doctor_shows_the_runtime_of_an_npu_model(model: str, tmp_path: Path, release: str) -> None:
    done = doctor(*flags(model, tmp_path, release))
    assert done.exit_code == 0, done.output
    assert (
        f"Runtime  RKLLM {release} with the layout of {'1.2.1' if release == '1.2.3' else release}"
        in done.output
    )
    assert "context at most 16384 tokens, in steps of 32" in done.output
    report = json.loads(doctor(*flags(model, tmp_path, release), "--json").output)
    assert report["board"]["runtime"]["path"] == standin(release)


@pytest.mark.slow
def test_doctor_shows_the_settings_that_an_npu_model_has_and_refuses_those_it_can_not_have(
    model: str, tmp_path: Path
) -> None:
    arguments = [*flags(model, tmp_path, "1.3.0"), "--json"]
    (shown,) = json.loads(doctor(*arguments, env={"HEADSTART_CTX": "512"}).output)["models"]
    settings = {setting["name"]: (setting["value"], setting["origin"]) for setting in shown["settings"]}
    assert settings["ctx"] == ("512", "environment")
    assert settings["rkllm_library"] == (standin("1.3.0"), "flag")
    assert settings["rkllm_embed_flash"] == ("on", "default")
    assert "flash_attention" not in settings
    done = doctor(*arguments, env={"HEADSTART_CTX": "1000"})
    assert done.exit_code == 1
    assert "a context of 1000 tokens: it must be a multiple of 32" in done.output


def test_doctor_says_nothing_of_an_npu_where_there_is_none(tmp_path: Path) -> None:
    report = json.loads(doctor("--model", "toy=toy:", "--cache-dir", str(tmp_path), "--json").output)
    assert report["board"] is None


def test_modules_in_the_current_folder_are_no_part_of_what_looks_at_the_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "msgspec.py").write_text("raise SystemExit('a module of the current folder')")
    monkeypatch.chdir(tmp_path)
    runtime, problem = boards.look_at_runtime(RkllmSettings(library=standin("1.2.3")))
    assert (runtime and runtime.version, problem) == ("1.2.3", None)


@pytest.mark.slow
def test_a_runtime_that_contradicts_itself_is_a_problem_of_its_models(model: str, tmp_path: Path) -> None:
    arguments = [*flags(model, tmp_path, "1.2.3")[:-1], standin("1.2.3", 130)]
    done = doctor(*arguments)
    assert done.exit_code == 1
    assert "says that it is RKLLM 1.2.3, but has default parameters like 1.3.0" in done.output
    assert "set rkllm_abi" in done.output
    forced = doctor(*arguments, "--rkllm-abi", "1.3.0")
    assert forced.exit_code == 0
    assert "RKLLM 1.2.3 with the layout of 1.3.0, as set" in forced.output


def checks(model: str, tmp_path: Path, release: str, switches: str = "") -> tuple[int, dict[str, Any]]:
    done = doctor(*flags(model, tmp_path, release), "--npu-checks", "qwen", env={"RKLLM_STANDIN": switches})
    report = json.loads(done.stdout)
    report["steps"] = {step["name"]: step for step in report["steps"]}
    return done.exit_code, report


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.slow
def test_the_first_checks_report_what_the_runtime_does(model: str, tmp_path: Path, release: str) -> None:
    status, report = checks(model, tmp_path, release, "decode_ms=20")
    assert status == 0
    assert report["board"]["runtime"]["version"] == release
    steps = report["steps"]
    assert list(steps) == list(STEPS)
    counted = None if release == "1.2.0" else True
    first = steps["first_run"]["found"]
    assert first["same_text"]
    assert first["our_tokens_are_counted"] is (counted or False)
    assert first["memory_is_reused"] is counted
    saved = steps["saved_and_restored"]["found"]
    assert (saved["file_was_written"], saved["same_text"], saved["state_is_used"]) == (True, True, counted)
    assert saved["file_tokens"] >= saved["saving"]["our_prompt_tokens"] > 300
    rounds = steps["two_in_turn"]["found"]["rounds"]
    assert [len({str(r["tokens_told"]) for r in rounds[i::2]}) for i in (0, 1)] == [1, 1]
    assert steps["aborted"]["found"]["same_text"]
    # What Headstart avoids crashes the stand-in, as users say it does the runtime.
    assert steps["loaded_after_abort"]["signal"] == "SIGSEGV"


@pytest.mark.slow
def test_the_first_checks_find_what_is_wrong_and_go_on(model: str, tmp_path: Path) -> None:
    _, report = checks(model, tmp_path, "1.3.0", "reuse=none")
    assert report["steps"]["saved_and_restored"]["found"]["state_is_used"] is False
    status, report = checks(model, tmp_path, "1.3.0", "save=skip")
    assert report["steps"]["saved_and_restored"]["found"]["file_was_written"] is False
    assert "rkllm_load_prompt_cache answered -1" in report["steps"]["two_in_turn"]["error"]
    assert report["steps"]["aborted"]["found"]
    assert status == 1
    status, report = checks(model, tmp_path, "1.3.0", "decode=crash")
    assert {step["signal"] for step in report["steps"].values()} == {"SIGSEGV"}
    assert any("told to crash" in line for line in report["steps"]["first_run"]["log"])
    assert status == 1


def test_only_npu_models_can_be_checked(tmp_path: Path) -> None:
    done = doctor("--model", "toy=toy:", "--npu-checks", "toy")
    assert done.exit_code != 0
    assert "neither a .rkllm file nor the name of a model that is one" in done.output
    done = doctor("--npu-checks", os.fspath(tmp_path / "missing.rkllm"))
    assert done.exit_code != 0
    assert "can't be read" in done.output
