"""How much the state stores may hold: chosen from the machine or set, and divided among the models."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

import blocks
from headstart import machine
from headstart.cli.main import app
from headstart.config.settings import Settings
from headstart.protocol import StoreReport
from headstart.service.models.state_limits import (
    disk_limit,
    held,
    memory_limit,
    shares,
    states_directory,
    with_rest,
)
from headstart.service.service import Service

GB = 1_000_000_000


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize(
    ("there", "limit"), [(2 << 30, 2 << 26), (4 << 30, 4 << 26), (16 * GB, 2 * GB), (512 * GB, 8 * GB)]
)
def test_the_memory_is_an_eighth_of_the_machines_and_less_on_small_ones(
    there: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "allowed_memory_bytes", lambda: there)
    assert memory_limit(Settings()).n_bytes == limit
    assert memory_limit(Settings(state_memory_mb=5)).n_bytes == 5_000_000
    assert memory_limit(Settings(state_memory_mb=0)).n_bytes == 0


@pytest.mark.parametrize(
    ("free", "limit"), [(0, 0), (4 * GB, GB // 5), (50 * GB, 5 * GB), (900 * GB, 20 * GB)]
)
def test_the_disk_space_is_a_tenth_of_what_is_free_and_less_where_that_is_little(
    free: int, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free))
    assert disk_limit(Settings(cache_dir=tmp_path / "absent")).n_bytes == limit
    assert disk_limit(Settings(cache_dir=tmp_path, state_disk_mb=5)).n_bytes == 5_000_000
    assert disk_limit(Settings(cache_dir=tmp_path, state_disk_mb=0)).n_bytes == 0


def _keep(cache_dir: Path, model: str, n_bytes: int) -> None:
    """A file of this size, which no worker can use."""
    file = states_directory(cache_dir) / model / "x"
    file.parent.mkdir(parents=True)
    with file.open("wb") as out:
        out.truncate(n_bytes)


def _fill(cache_dir: Path, model: str) -> int:
    """Ten blocks; returns their bytes."""
    for number in range(10):
        header = blocks.header([number], sizes=(1_000_000, 0))
        blocks.write(blocks.directory(states_directory(cache_dir) / model), header)
    return held(cache_dir)[model]


def test_the_limit_does_not_fall_because_the_stores_hold_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _keep(tmp_path, "one", 4 * GB)
    assert held(tmp_path) == {"one": 4 * GB}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 46 * GB))
    assert disk_limit(Settings(cache_dir=tmp_path)).n_bytes == 5 * GB


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, {}),
        ({"a": 40}, {"a": 40}),
        ({"a": 400}, {"a": 100}),
        ({"a": 30, "b": 60}, {"a": 30, "b": 60}),
        ({"a": 30, "b": 90}, {"a": 30, "b": 70}),
        ({"a": 90, "b": 200}, {"a": 50, "b": 50}),
        ({"a": 10, "b": 90, "c": 90}, {"a": 10, "b": 45, "c": 45}),
    ],
)
def test_a_limit_is_divided_by_what_is_wanted_and_nobody_is_left_without(
    wanted: dict[str, int], expected: dict[str, int]
) -> None:
    assert shares(100, wanted) == expected


def test_what_nobody_wants_goes_to_the_loaded_models() -> None:
    assert with_rest(100, {"a": 30, "b": 20, "c": 10}, ["a", "b"]) == {"a": 50, "b": 40, "c": 10}


@asynccontextmanager
async def _service(directory: Path, **more: Any) -> AsyncIterator[Service]:
    models = {"one": "toy:", "two": "toy:weights=other"}
    limits = {"state_memory_mb": 80, "state_disk_mb": 800, **more}
    service = Service(Settings(models=models, cache_dir=directory, tune=False, **limits))
    await service.load()
    try:
        yield service
    finally:
        await service.close()


def _disk(service: Service, model: str) -> int:
    return service.models.all[model].engine.settings.states.disk_bytes


def _memory(service: Service, model: str) -> int:
    return service.models.all[model].engine.settings.states.memory_bytes


async def test_the_only_model_gets_everything_and_a_second_one_its_part(tmp_path: Path) -> None:
    async with _service(tmp_path) as service:
        states = service.models.all["one"].engine.settings.states
        assert (states.memory_bytes, states.disk_bytes, states.days) == (80_000_000, 800_000_000, 7)
        assert Path(states.directory) == states_directory(tmp_path) / "one"
        assert states.weights
        two = service.model("two")
        async with service.models.use(two):
            assert _memory(service, "one") == _memory(service, "two") == 40_000_000
            assert _disk(service, "one") == _disk(service, "two") == 400_000_000
        await service.models.unload(two.served)
        await service.models.states.settled()
        assert _memory(service, "one") == 80_000_000


async def test_what_an_unloaded_model_holds_is_left_to_it_until_others_need_room(tmp_path: Path) -> None:
    filled = _fill(tmp_path, "gone")
    async with _service(tmp_path, state_disk_mb=12) as service:
        assert _disk(service, "one") == 12_000_000 - filled
        engine = service.models.all["one"].engine
        for full in (1_900_000, 3_700_000, 6_000_000):
            engine._dispatch(StoreReport(disk_bytes=full))
            await service.models.states.settled()
            assert _disk(service, "one") + held(tmp_path)["gone"] <= 12_000_000
        assert _disk(service, "one") == 6_000_000
        assert 5_000_000 < held(tmp_path)["gone"] <= 6_000_000


async def test_a_model_for_the_npu_gets_no_store_and_takes_nothing_from_others(tmp_path: Path) -> None:
    async with _service(tmp_path) as service:
        npu = service.models.all["two"]
        npu.path = "model.rkllm"
        await service.models.states.claim(npu)
        assert _memory(service, "one") == 80_000_000
        assert npu.states.directory == ""


def _reported(*flags: str, directory: Path) -> dict[str, tuple[str, str]]:
    arguments = ["doctor", "--json", "--model", "toy=toy:", "--cache-dir", str(directory), *flags]
    report = json.loads(CliRunner().invoke(app, arguments).stdout)
    return {limit["name"]: (limit["value"], limit["origin"]) for limit in report["states"]}


def test_the_doctor_shows_the_limits_and_where_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "allowed_memory_bytes", lambda: 16 * GB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 5 * GB))
    assert _reported(directory=tmp_path) == {
        "state_memory_mb": ("2000", "an eighth of the memory"),
        "state_disk_mb": ("250", "a twentieth of the free disk space"),
        "state_days": ("7", "default"),
    }
    monkeypatch.setenv("HEADSTART_STATE_DISK_MB", "0")
    assert _reported("--state-memory-mb", "64", directory=tmp_path) == {
        "state_memory_mb": ("64", "flag"),
        "state_disk_mb": ("off", "environment"),
        "state_days": ("7", "default"),
    }
