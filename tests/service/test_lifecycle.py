"""Starting, stopping, crashing and coming back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from conftest import StartServer
from forkserver import headstart
from servers import RunningServer, eventually, said

PROMPT = "You keep the lighthouse. " * 20


def _is_healthy(server: RunningServer) -> bool:
    return server.http.get("/ready").status_code == 200


@pytest.mark.slow
def test_a_build_that_crashes_at_its_first_decode_is_reported_with_the_cure(tmp_path: Path) -> None:
    done = headstart("serve", "--port", "0", "--cache-dir", str(tmp_path), "--model", "toy=toy:crash=decode")
    assert done.returncode == 1
    assert "SIGILL" in done.stderr
    assert "make rebuild" in done.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model", "m=/absent/model.gguf"], "/absent/model.gguf"),
        (["--model", "m"], "NAME=PATH"),
        (["--model", "../m=toy:"], "not a name"),
        (["--model", "toy=toy:", "--alias", "a=b"], "not a model"),
        (["--model", "toy=toy:nonsense=1"], "nonsense"),
        (["--model", "toy=toy:template={{"], "Jinja"),
        (["--config", "/absent.toml"], "absent.toml"),
        (["--config", "BROKEN"], "not valid TOML"),
        (["--config", "TEMPLATE"], "absent.jinja"),
        (["--slots", "-1"], "slots"),
        (["--model", "toy=toy:", "--cache-dir", "/dev/null/cache"], "Not a directory"),
        (["--model", "m=/"], "can't be read"),
        (["--host", "192.0.2.1", "--insecure", "--model", "toy=toy:"], "Can't listen"),
    ],
)
def test_a_server_that_can_not_start_says_why(tmp_path: Path, flags: list[str], told: str) -> None:
    (tmp_path / "BROKEN").write_text("port = = 1")
    (tmp_path / "TEMPLATE").write_text('templates = {m = "/absent.jinja"}\nmodels = {m = "toy:"}\n')
    flags = [str(tmp_path / flag) if flag.isupper() else flag for flag in flags]
    done = headstart("serve", "--port", "0", "--cache-dir", str(tmp_path / "cache"), *flags)
    assert done.returncode != 0
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_file_that_is_not_a_model_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"rubbish" * 100)
    model = f"m={tmp_path / 'm.gguf'}"
    done = headstart("serve", "--port", "0", "--cache-dir", str(tmp_path / "cache"), "--model", model)
    assert done.returncode == 1
    assert "m.gguf" in done.stderr


def test_a_second_server_on_the_same_directory_is_refused(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    second = headstart("serve", "--port", "0", "--cache-dir", str(server.cache_dir), "--model", "toy=toy:")
    assert second.returncode == 1
    assert "Another Headstart server" in second.stderr
    assert _is_healthy(server)


def test_settings_come_from_flags_before_environment_before_file(tmp_path: Path) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text('ctx = 100\nslots = 2\nport = 1\n[models]\ntoy = "toy:"\n')
    from headstart.config.settings import load_settings

    os.environ["HEADSTART_SLOTS"] = "3"
    try:
        settings = load_settings(config, port=5)
    finally:
        del os.environ["HEADSTART_SLOTS"]
    assert (settings.port, settings.slots, settings.ctx) == (5, 3, 100)
    assert settings.model_paths == {"toy": "toy:"}


@pytest.mark.slow
def test_health_is_503_while_the_model_loads_and_requests_are_told_to_come_back(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "headstart", "serve", "--port", str(port)),
            *("--cache-dir", str(tmp_path / "cache"), "--model", "toy=toy:load_ms=1500"),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:

            def answers() -> bool:
                try:
                    http.get("/health")
                except httpx.TransportError:
                    return False
                return True

            eventually(answers)
            body = {"model": "toy", "messages": [{"role": "user", "content": "x"}]}
            for loading in (http.get("/ready"), http.post("/v1/chat/completions", json=body)):
                assert loading.status_code == 503
                assert loading.json()["error"]["code"] == "model_loading"
                assert int(loading.headers["retry-after"]) >= 1
            assert http.get("/v1/models").status_code == 200
            eventually(lambda: http.get("/ready").status_code == 200)
            assert http.post("/v1/chat/completions", json=body).status_code == 200
    finally:
        process.terminate()
        assert process.wait(20) == 0


def test_a_stop_lets_a_running_stream_end(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:eos=0,ms_per_token=10")
    body = {"model": "toy", "prompt": "x", "max_tokens": 60, "stream": True}
    lines: list[str] = []
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if not lines:
                server.process.terminate()
            lines += [line] if line else []
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 60
    assert server.process.wait(20) == 0


def test_no_worker_outlives_its_server(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    (worker,) = server.workers()
    server.stop(signal.SIGKILL)

    def has_ended() -> bool:
        with suppress(psutil.NoSuchProcess):
            return not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
        return True

    eventually(has_ended)


@pytest.mark.parametrize("model", ["toy", pytest.param("smollm2", marks=pytest.mark.real_model)])
def test_a_killed_worker_ends_its_streams_with_an_error_and_comes_back(
    start_server: StartServer, model: str
) -> None:
    flags = ("--model", "toy=toy:eos=0,ms_per_token=5") if model == "toy" else ()
    server = start_server(*flags)
    server.create("keeper", PROMPT, model=model)
    before = server.chat("Who is there?", model=model, use_cache="keeper")
    (worker,) = server.workers()
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Tell me all about ships."}],
        "use_cache": "keeper",
        "max_tokens": 400,
        "stream": True,
    }
    lines: list[str] = []
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in filter(None, response.iter_lines()):
            lines.append(line)
            if len(lines) == 4:
                worker.send_signal(signal.SIGKILL)
    assert lines[-1] == "data: [DONE]"
    error = json.loads(lines[-2].removeprefix("data: "))["error"]
    assert error["code"] == "engine_died"
    assert "SIGKILL" in error["message"]
    eventually(lambda: _is_healthy(server))
    after = server.chat("Who is there?", model=model, use_cache="keeper")
    assert after["usage"]["cache_hit"] is True
    assert said(after) == said(before)
    assert [process.pid for process in server.workers()] != [worker.pid]


def test_a_killed_worker_fails_waiting_and_building_requests_with_503(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:eos=0,ms_per_token=5", "--slots", "1")
    answers: list[httpx.Response] = []

    def post(path: str, body: dict[str, Any]) -> None:
        answers.append(httpx.post(server.url + path, json=body, timeout=60))

    requests = [
        ("/v1/cache/toy", {"cache_name": "keeper", "prompt": PROMPT}),
        ("/v1/completions", {"model": "toy", "prompt": "x", "max_tokens": 50}),
    ]
    threads = [threading.Thread(target=post, args=request) for request in requests]
    for thread in threads:
        thread.start()
    eventually(lambda: any("tmp" in name for name in server.files()))
    server.workers()[0].send_signal(signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [503, 503]
    assert {answer.json()["error"]["code"] for answer in answers} <= {"engine_died", "model_loading"}
    eventually(lambda: _is_healthy(server))
    assert server.files() == []
    server.create("keeper", PROMPT)


@pytest.mark.slow
def test_a_server_killed_at_any_moment_leaves_each_cache_whole_or_absent(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=0.2")
    server.create("kept", PROMPT)
    expected = said(server.chat("Who?", use_cache="kept"))
    for round_ in range(12):
        url = server.url
        prompt = PROMPT + f"round {round_ // 2}"

        def create(url: str = url, prompt: str = prompt, name: str = f"new{round_}") -> None:
            try:
                httpx.post(f"{url}/v1/cache/toy", json={"cache_name": "kept", "prompt": PROMPT})
                httpx.post(f"{url}/v1/cache/toy", json={"cache_name": name, "prompt": prompt})
            except httpx.TransportError:
                pass

        thread = threading.Thread(target=create)
        thread.start()
        time.sleep(0.03 * round_)
        server.stop(signal.SIGKILL)
        thread.join()
        server.start()
        assert not [name for name in server.files() if "tmp" in name]
        for entry in server.http.get("/v1/cache/toy").json()["data"]:
            answer = server.chat("Who?", use_cache=entry["cache_name"])
            assert answer["usage"]["cache_hit"] is True
            if entry["cache_name"] == "kept":
                assert said(answer) == expected


def test_a_deleted_cache_is_gone_and_its_name_free(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    assert server.http.delete("/v1/cache/toy/keeper").json()["deleted"] is True
    assert server.files() == []
    assert server.http.get("/v1/cache/toy/keeper").status_code == 404
    assert server.http.delete("/v1/cache/toy/keeper").status_code == 404
    assert server.create("keeper", PROMPT)["object"] == "cache.created"


def test_a_request_for_a_cache_being_built_waits_for_it(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=1")
    thread = threading.Thread(target=lambda: server.create("keeper", PROMPT))
    thread.start()
    eventually(lambda: any("tmp" in name for name in server.files()))
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"model": "toy", "use_cache": "keeper", "messages": [{"role": "user", "content": "x"}]},
        timeout=30,
    ).json()
    thread.join()
    assert answer["usage"]["cache_hit"] is True


def test_clients_that_leave_free_their_slots(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:eos=0,ms_per_token=2,ctx=100000", "--slots", "2")
    body = {"model": "toy", "prompt": "x", "max_tokens": 90_000}
    for _ in range(2):
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}) as response:
            next(response.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.2)
    assert server.chat("x", max_tokens=2)["usage"]["completion_tokens"] == 2
