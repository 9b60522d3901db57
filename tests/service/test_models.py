"""Several models: loaded when they are used, unloaded when room is needed, with caches that outlive both."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import StartServer
from forkserver import headstart
from headstart.model_files import embedded_model, models_in
from servers import RunningServer, events, eventually, said

PROMPT = "You keep the lighthouse and " + " and ".join(f"watch ship number {i}" for i in range(40))
TWO = ("--model", "one=toy:", "--model", "two=toy:weights=other")


def _states(server: RunningServer) -> dict[str, str]:
    answer = server.http.get("/v1/models/available").json()
    return {model["id"]: model["state"] for model in answer["data"]}


def _loaded(server: RunningServer) -> list[str]:
    return [model["id"] for model in server.http.get("/v1/models/loaded").json()["data"]]


def _command(server: RunningServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    return headstart(*arguments, "--url", server.url)


def test_a_model_is_loaded_when_it_is_first_used(start_server: StartServer) -> None:
    server = start_server(*TWO)
    assert _states(server) == {"one": "ready", "two": "available"}
    assert server.http.get("/health").json()["models"] == {"one": "ready", "two": "available"}
    assert len(server.workers()) == 1
    assert said(server.chat("Hello?", model="two"))
    assert _loaded(server) == ["one", "two"]
    assert len(server.workers()) == 2


@pytest.mark.parametrize(("preload", "expected"), [("all", ["one", "two"]), ("none", [])])
def test_what_is_loaded_at_the_start_can_be_set(
    start_server: StartServer, preload: str, expected: list[str]
) -> None:
    server = start_server(*TWO, env={"HEADSTART_PRELOAD": preload})
    assert server.http.get("/ready").status_code == 200
    assert _loaded(server) == expected
    assert said(server.chat("Hello?", model="one"))


def test_requests_for_one_model_at_once_load_it_once_and_all_are_answered(start_server: StartServer) -> None:
    server = start_server("--model", "one=toy:", "--model", "two=toy:load_ms=500")
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda: answers.append(said(server.chat("Hello?", model="two"))))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    eventually(lambda: _states(server)["two"] == "loading")
    assert server.http.get("/ready").status_code == 200
    for thread in threads:
        thread.join()
    assert len(answers) == 6
    assert len(set(answers)) == 1
    assert len(server.workers()) == 2


def test_a_request_waits_for_its_model_no_longer_than_it_should(start_server: StartServer) -> None:
    env = {"HEADSTART_LOAD_TIMEOUT": "0.2"}
    server = start_server("--model", "one=toy:", "--model", "two=toy:load_ms=1500", env=env)
    response = server.post("/v1/completions", model="two", prompt="Hello")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "model_loading"
    assert response.headers["retry-after"]
    eventually(lambda: _states(server)["two"] == "ready")
    assert said(server.chat("Hello?", model="two"))


def test_the_model_not_used_for_longest_makes_room_and_caches_hit_after_each_swap(
    start_server: StartServer,
) -> None:
    server = start_server(*TWO, "--max-loaded", "1")
    server.create("keeper", PROMPT, model="one")
    server.create("keeper", PROMPT, model="two")
    cold = {
        name: server.chat("Ships?", model=name, system=PROMPT, cache_prompt=False) for name in ("one", "two")
    }
    for name in ("one", "two", "one"):
        warm = server.chat("Ships?", model=name, use_cache="keeper")
        assert warm["usage"]["cache_hit"] is True
        assert warm["timings"]["cache_source"] == "file"
        assert said(warm) == said(cold[name])
        assert _loaded(server) == [name]
        assert len(server.workers()) == 1


def test_a_model_in_use_is_not_unloaded_for_another(start_server: StartServer) -> None:
    slow = "one=toy:ms_per_token=20,eos=0"
    server = start_server("--model", slow, "--model", "two=toy:", "--max-loaded", "1")
    answer: list[dict[str, Any]] = []
    running = threading.Thread(
        target=lambda: answer.append(server.chat("Go on.", model="one", max_tokens=60))
    )
    running.start()
    eventually(lambda: len(server.workers()) == 1 and _busy(server))
    refused = server.post("/v1/completions", model="two", prompt="Hello")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "out_of_memory")
    running.join()
    assert answer[0]["usage"]["completion_tokens"] == 60
    assert said(server.chat("Hello?", model="two"))


def _busy(server: RunningServer) -> bool:
    return server.post("/v1/models/unload", model="one").status_code == 409


VAST = ("--model", "one=toy:ms_per_token=20,eos=0", "--model", "vast=toy:memory_mb=1000000000")


def test_idle_models_are_unloaded_where_memory_does_not_hold_one_more(start_server: StartServer) -> None:
    server = start_server(*VAST)
    # Alone, a model may take more than is available: the weights it maps need not all be in memory.
    assert said(server.chat("Hello?", model="vast"))
    assert _loaded(server) == ["vast"]
    assert said(server.chat("Hello?", model="one", max_tokens=4))


def test_a_model_that_memory_does_not_hold_beside_one_in_use_is_refused(start_server: StartServer) -> None:
    server = start_server(*VAST)
    body = {"model": "one", "prompt": "Go on", "max_tokens": 1000, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as running:
        chunks = events(running)
        next(chunks)
        refused = server.post("/v1/completions", model="vast", prompt="Hello")
        next(chunks)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "out_of_memory")
    assert "1000000000 MB" in refused.json()["error"]["message"]
    assert said(server.chat("Hello?", model="vast"))


def test_a_model_that_cannot_be_loaded_is_told_to_its_requests_only(
    start_server: StartServer, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and nothing more")
    server = start_server("--model", "one=toy:", "--model", f"broken={broken}")
    for _ in range(2):
        response = server.post("/v1/completions", model="broken", prompt="Hello")
        assert response.status_code == 503
        assert "broken" in response.json()["error"]["message"]
    assert said(server.chat("Hello?", model="one"))
    assert server.http.get("/ready").status_code == 200


def test_a_model_can_be_loaded_and_unloaded_over_http(start_server: StartServer) -> None:
    server = start_server(*TWO)
    loaded = server.post("/v1/models/load", model="two").json()
    assert (loaded["id"], loaded["state"]) == ("two", "ready")
    unloaded = server.post("/v1/models/unload", model="two").json()
    assert (unloaded["state"], unloaded["unloaded"]) == ("available", True)
    assert server.post("/v1/models/unload", model="two").json()["unloaded"] is False
    assert server.post("/v1/models/unload", model="three").status_code == 404
    eventually(lambda: len(server.workers()) == 1)
    assert said(server.chat("Hello?", model="two"))


def test_a_model_in_use_is_unloaded_only_by_force(start_server: StartServer) -> None:
    server = start_server("--model", "one=toy:ms_per_token=20,eos=0")
    failed: list[int] = []

    def ask() -> None:
        body = {"model": "one", "prompt": "Go on", "max_tokens": 500}
        failed.append(server.http.post("/v1/completions", json=body).status_code)

    running = threading.Thread(target=ask)
    running.start()
    begun = 'vllm:num_requests_running{model_name="one"} 1.0'
    eventually(lambda: begun in server.http.get("/metrics").text)
    assert _busy(server)
    assert server.post("/v1/models/unload", model="one", force=True).json()["unloaded"] is True
    running.join()
    assert failed == [503]
    assert said(server.chat("Hello?", model="one", max_tokens=4))


def test_caches_are_listed_shown_and_deleted_while_their_model_is_not_loaded(
    start_server: StartServer,
) -> None:
    server = start_server(*TWO)
    server.create("keeper", PROMPT, model="two")
    server.post("/v1/models/unload", model="two")
    assert [cache["cache_name"] for cache in server.http.get("/v1/cache/two").json()["data"]] == ["keeper"]
    assert server.http.get("/v1/cache/two/keeper").json()["prompt"] == PROMPT
    assert server.http.delete("/v1/cache/two/keeper").json()["deleted"] is True
    assert _states(server)["two"] == "available"
    server.create("keeper", PROMPT, model="two")
    assert _states(server)["two"] == "ready"


def test_a_model_that_is_not_used_for_a_while_is_unloaded(start_server: StartServer) -> None:
    server = start_server(*TWO, env={"HEADSTART_IDLE_UNLOAD_SECONDS": "0.3"})
    server.chat("Hello?", model="two")
    eventually(lambda: _loaded(server) == [])
    assert server.http.get("/ready").status_code == 200
    assert said(server.chat("Hello?", model="one"))


def test_requests_beside_unloading_are_all_answered(start_server: StartServer) -> None:
    server = start_server(*TWO)
    expected = said(server.chat("Hello?", model="two"))
    end = time.monotonic() + 4
    answers: list[str] = []

    def ask() -> None:
        while time.monotonic() < end:
            answers.append(said(server.chat("Hello?", model="two")))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    unloaded = 0
    while time.monotonic() < end:
        response = server.post("/v1/models/unload", model="two")
        assert response.status_code in (200, 409)
        unloaded += response.status_code == 200 and response.json()["unloaded"]
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert unloaded
    assert len(answers) > 10
    assert set(answers) == {expected}


def test_a_folder_of_models_has_those_of_its_files(tmp_path: Path) -> None:
    for name in (
        *("smol model.gguf", "big-00001-of-00002.gguf", "big-00002-of-00002.gguf"),
        *("mmproj-big.gguf", "notes.txt", "_.gguf"),
    ):
        (tmp_path / name).touch()
    assert {name: Path(path).name for name, path in models_in(tmp_path).items()} == {
        "smol-model": "smol model.gguf",
        "big": "big-00001-of-00002.gguf",
    }
    assert models_in(tmp_path / "none") == {}


def test_a_server_without_any_model_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    folders = ("--models-dir", str(folder), "--cache-dir", str(tmp_path / "cache"))
    ended = headstart("serve", "--port", "0", *folders)
    assert ended.returncode == 1
    assert "no file named *.gguf" in ended.stderr


def test_models_are_listed_loaded_and_unloaded_from_the_command_line(start_server: StartServer) -> None:
    server = start_server(*TWO)
    listed = _command(server, "model", "list").stdout
    assert "two" in listed
    assert "not loaded" in listed
    assert _command(server, "model", "load", "two").stdout == "Loaded two\n"
    assert _command(server, "model", "unload", "two").stdout == "Unloaded two\n"
    assert _command(server, "model", "unload", "two").stdout == "two was not loaded\n"
    wrong = _command(server, "model", "load", "three")
    assert wrong.returncode == 1
    assert "There is no model 'three'" in wrong.stderr


@pytest.mark.real_model
def test_real_models_from_a_folder_swap_and_their_caches_hit(
    start_server: StartServer, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "ada.gguf").symlink_to(embedded_model())
    server = start_server("--models-dir", str(folder), "--max-loaded", "1", "--slots", "1", "--ctx", "512")
    (folder / "bob.gguf").symlink_to(embedded_model())
    assert _states(server) == {"ada": "ready", "bob": "available"}
    texts = set()
    for name in ("ada", "bob"):
        server.create("keeper", PROMPT[:500], model=name, **{"for": ["chat"]})
    for name in ("ada", "bob", "ada"):
        warm = server.chat("What do you watch?", model=name, use_cache="keeper")
        assert warm["usage"]["cache_hit"] is True
        assert warm["timings"]["cache_source"] == "file"
        assert _loaded(server) == [name]
        texts.add(said(warm))
    assert len(texts) == 1
