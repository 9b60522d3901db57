"""Each event of a running server reaches its observers once."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from headstart.caches.entry import Content
from headstart.config.settings import Settings
from headstart.errors import EngineDied, Unavailable
from headstart.service.interface.answer import Result
from headstart.service.interface.observer import (
    Answered,
    Built,
    Evicted,
    Failure,
    Loaded,
    Observer,
    Restored,
)
from headstart.service.interface.options import Options
from headstart.service.service import Service
from own_workers import own_workers

PROMPT = "You are a helpful assistant who knows all about the sea, its ships and its fish. " * 20
USER = [{"role": "user", "content": "Tell me of the sea."}]


class Recorder(Observer):
    def __init__(self) -> None:
        self.events: list[object] = []

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def answered(self, event: Answered) -> None:
        self.events.append(event)

    def built(self, event: Built) -> None:
        self.events.append(event)

    def evicted(self, event: Evicted) -> None:
        self.events.append(event)

    def loaded(self, event: Loaded) -> None:
        self.events.append(event)

    def restored(self, event: Restored) -> None:
        self.events.append(event)

    def failed(self, event: Failure) -> None:
        self.events.append(event)


@asynccontextmanager
async def running(
    directory: Path, model: str = "toy:", **settings: Any
) -> AsyncIterator[tuple[Service, Recorder]]:
    recorder = Recorder()
    chosen = Settings(models={"toy": model}, cache_dir=directory, tune=False, **settings)
    service = Service(chosen, observers=[recorder])
    try:
        await service.load()
        yield service, recorder
    finally:
        await service.close()


async def ask(service: Service, options: Options) -> Result:
    model = service.resolve("toy").model
    prepared = await service.generation.chat(model, list(USER), options)
    events = [event async for event in service.generation.run(prepared)]
    assert isinstance(events[-1], Result)
    return events[-1]


async def test_loads_builds_answers_and_restores_are_observed_once(tmp_path: Path) -> None:
    async with running(tmp_path, "toy:eos=0") as (service, recorder):
        (loaded,) = recorder.events
        assert isinstance(loaded, Loaded)
        assert loaded.model == "toy"
        entry = await service.caches.create(service.model("toy"), "sea", Content(PROMPT))
        (built,) = recorder.of(Built)
        assert (built.entry, set(built.stats)) == (entry, {"chat", "completion"})
        # Another chat takes the slots, so that the next use of the cache restores its state.
        for _ in range(service.model("toy").info.slots):
            await ask(service, Options(max_tokens=3, reuse=False))
        assert recorder.of(Restored) == []
        result = await ask(service, Options(max_tokens=3, use_cache=("sea",)))
        assert result.cache_hit
        answered = recorder.of(Answered)
        assert answered[-1].result is result
        assert (answered[-1].model, answered[-1].owner, answered[-1].reasons) == ("toy", "", ["length"])
        assert len(answered) == service.model("toy").info.slots + 1
        (restored,) = recorder.of(Restored)
        assert restored.stats == result.stats
        assert recorder.of(Failure) == []


async def test_an_eviction_is_observed_with_the_bytes_that_it_freed(tmp_path: Path) -> None:
    async with running(tmp_path) as (service, _):
        one = await service.caches.create(service.model("toy"), "one", Content(PROMPT))
    room = one.size_bytes * 1.5 / 1e6
    async with running(tmp_path, quota_mb=room) as (service, recorder):
        await service.caches.create(service.model("toy"), "two", Content(PROMPT + " And sails."))
        (evicted,) = recorder.of(Evicted)
        assert evicted.entry.name == "one"
        left = service.caches.look_up(service.model("toy"), "one", param="name")
        assert evicted.freed == one.size_bytes - left.size_bytes > 0


async def test_an_answer_and_a_build_that_fail_are_observed(tmp_path: Path) -> None:
    async with running(tmp_path, "toy:ms_per_token=5,eos=0") as (service, recorder):
        prepared = await service.generation.chat(service.model("toy"), list(USER), Options())
        answers = service.generation.run(prepared)
        await anext(answers)
        for worker in own_workers():
            worker.kill()
        with pytest.raises(EngineDied):
            async for _ in answers:
                pass
        (failure,) = recorder.of(Failure)
        assert (failure.work, failure.model) == ("answer", "toy")
        assert isinstance(failure.error, EngineDied)
        with pytest.raises(Unavailable):
            await service.caches.create(service.model("toy"), "sea", Content(PROMPT))
        assert [failure.work for failure in recorder.of(Failure)] == ["answer", "build"]


async def test_a_load_that_fails_is_observed(tmp_path: Path) -> None:
    missing = {"toy": "toy:", "other": str(tmp_path / "none.gguf")}
    recorder = Recorder()
    service = Service(Settings(models=missing, cache_dir=tmp_path, tune=False), observers=[recorder])
    try:
        await service.load()
        with pytest.raises(Unavailable):
            async with service.models.use(service.model("other")):
                pass
        (failure,) = recorder.of(Failure)
        assert (failure.work, failure.model) == ("load", "other")
    finally:
        await service.close()


async def test_an_answer_that_its_client_leaves_is_observed_as_failed(tmp_path: Path) -> None:
    async with running(tmp_path, "toy:eos=0") as (service, recorder):
        prepared = await service.generation.chat(service.model("toy"), list(USER), Options())
        answers = service.generation.run(prepared)
        await anext(answers)
        await answers.aclose()
        (failure,) = recorder.of(Failure)
        assert isinstance(failure.error, GeneratorExit)
        assert recorder.of(Answered) == []


async def test_the_log_is_written_from_the_events(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "headstart"):
        async with running(tmp_path) as (service, _):
            await service.caches.create(service.model("toy"), "sea", Content(PROMPT))
    assert any("model toy was loaded in" in line for line in caplog.messages)
    assert any("built cache sea of toy: " in line for line in caplog.messages)
