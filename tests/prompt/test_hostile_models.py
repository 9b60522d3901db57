"""Model files that nobody should have made fail alone: the server and its other models go on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

import hostile_models
from conftest import StartServer
from servers import RunningServer, eventually, running_server, said
from sweeps import swept

PROMPTS = "headstart.prompt.process.worker"
# What a prompt process may take beside Python, and Python.
MEMORY_MB = 1536 + 512


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with all of them, and one good model, which is loaded at the start."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, metadata in hostile_models.REFUSED.items():
        hostile_models.written(folder / f"{name}.gguf", metadata())
    hostile_models.written(folder / "fine.gguf", hostile_models.pieces())
    hostile_models.written(folder / "late.gguf", hostile_models.without_bytes())
    with running_server(folder / "cache", "--model", "toy=toy:", "--models-dir", str(folder)) as server:
        yield server


def _ask(server: RunningServer, model: str, text: str = "hello") -> httpx.Response:
    return server.post(
        "/v1/chat/completions",
        model=model,
        messages=[{"role": "user", "content": text}],
        max_tokens=4,
        temperature=0,
    )


class Peak:
    """The most memory that one prompt process takes, looked at now and then."""

    def __init__(self, server: RunningServer) -> None:
        self.server, self.bytes, self.ends = server, 0, threading.Event()
        self.thread = threading.Thread(target=self._look)

    def __enter__(self) -> Peak:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ends.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.ends.wait(0.05):
            for process in self.server.processes(PROMPTS):
                try:
                    self.bytes = max(self.bytes, process.memory_info().rss)
                except psutil.Error:
                    continue


@pytest.mark.slow
@pytest.mark.parametrize("name", hostile_models.REFUSED)
def test_a_file_that_can_not_be_read_is_its_models_failure_alone(hostile: RunningServer, name: str) -> None:
    with Peak(hostile) as peak:
        refused = _ask(hostile, name)
    assert refused.status_code == 503, refused.text
    error = refused.json()["error"]
    assert error["code"] == "unavailable"
    assert error["message"].startswith(f"Model {name!r} can't run: ")
    assert len(error["message"]) > len(f"Model {name!r} can't run: ") + 10
    assert refused.headers["x-should-retry"] == "false"
    assert peak.bytes < MEMORY_MB << 20
    assert _ask(hostile, "toy").status_code == 200
    # Nothing of it is left running.
    assert len(hostile.processes(PROMPTS)) == len(hostile.workers())


@pytest.mark.slow
def test_other_models_are_loaded_while_a_file_takes_long_to_be_refused(hostile: RunningServer) -> None:
    answers: list[str] = []
    slow = threading.Thread(target=lambda: answers.append(_ask(hostile, "rwkv_long").reason_phrase))
    slow.start()
    time.sleep(0.5)
    answers.append(_ask(hostile, "fine").reason_phrase)
    slow.join()
    assert answers == ["OK", "Service Unavailable"]


@pytest.mark.slow
def test_a_text_that_aborts_the_tokenizer_fails_alone(hostile: RunningServer) -> None:
    assert _ask(hostile, "late").status_code == 200
    for _ in range(2):
        refused = _ask(hostile, "late", "h\u00e9llo")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "prompts_died")
        assert "SIGABRT" in refused.json()["error"]["message"]
        assert refused.headers["x-should-retry"] == "false"
        assert _ask(hostile, "toy").status_code == 200
        assert _ask(hostile, "late").status_code == 200


@pytest.mark.slow
@pytest.mark.sweep
def test_a_file_cut_off_anywhere_fails_alone(start_server: StartServer, tmp_path: Path) -> None:
    whole = hostile_models.written(tmp_path / "whole.gguf", hostile_models.pieces()).read_bytes()
    names = [f"cut{sixteenth}" for sixteenth in swept(range(16))] + ["cut3", "cut15"]
    for name in names:
        size = int(name.removeprefix("cut")) * len(whole) // 16
        (tmp_path / f"{name}.gguf").write_bytes(whole[:size])
    server = start_server("--model", "toy=toy:", "--models-dir", str(tmp_path))
    for name in names:
        refused = _ask(server, name)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert _ask(server, "toy").status_code == 200
    assert _ask(server, "whole").status_code == 200


@pytest.mark.slow
def test_requests_outlive_their_prompt_process(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    statuses: list[int] = []
    ends = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not ends.is_set():
                body = {"model": "toy", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
                statuses.append(client.post("/v1/chat/completions", json=body).status_code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        eventually(lambda: len(server.processes(PROMPTS)) == 1)
        (process,) = server.processes(PROMPTS)
        process.kill()
        before = len(statuses)
        eventually(partial(_has_answered, statuses, before + 4))
    ends.set()
    for thread in threads:
        thread.join()
    assert set(statuses) <= {200, 503}
    assert server.chat("Hello?")


def _has_answered(statuses: list[int], since: int) -> bool:
    return 200 in statuses[since:]


def test_a_prompt_process_that_was_killed_is_noticed_by_none(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    first = server.chat("Hello?")
    (process,) = server.processes(PROMPTS)
    process.kill()
    assert said(server.chat("Hello?")) == said(first)


def test_a_prompt_process_that_hangs_is_ended_and_started_again(start_server: StartServer) -> None:
    env = {"HEADSTART_PROMPT_TIMEOUT": "3", "HEADSTART_PRELOAD": "all"}
    server = start_server("--model", "one=toy:", "--model", "two=toy:", env=env)
    before = server.processes(PROMPTS)
    # Which is whose can't be seen from outside.
    for process in before:
        process.suspend()
        answers = [server.post("/v1/completions", model=name, prompt="Hello") for name in ("one", "two")]
        assert sorted(answer.status_code for answer in answers) == [200, 503]
        (refused,) = [answer for answer in answers if answer.status_code == 503]
        assert refused.json()["error"]["code"] == "prompts_died"
        assert "3 seconds" in refused.json()["error"]["message"]
        for name in ("one", "two"):
            assert server.post("/v1/completions", model=name, prompt="Hello").status_code == 200
    assert not {process.pid for process in before} & {process.pid for process in server.processes(PROMPTS)}


def test_prompt_processes_end_with_the_server(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    processes = server.processes()
    assert len(processes) == 2
    server.process.kill()
    eventually(lambda: not any(process.is_running() for process in processes))


@pytest.mark.slow
def test_doctor_tells_what_is_wrong_with_such_files(tmp_path: Path) -> None:
    hostile_models.written(tmp_path / "equal.gguf", hostile_models.REFUSED["equal_tokens"]())
    os.mkfifo(tmp_path / "pipe.gguf")
    models = [f"--model={name}={tmp_path / name}.gguf" for name in ("equal", "pipe")]
    done = subprocess.run(
        [sys.executable, "-m", "headstart", "doctor", *models, "--cache-dir", str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    told = " ".join(done.stdout.split())
    assert done.returncode == 1, done.stderr
    assert "SIGABRT" in told
    assert "there is no such file" in told
