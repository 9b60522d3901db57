"""Caches that the configuration declares are there, as declared, whenever the server runs."""

from __future__ import annotations

import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import StartServer
from forkserver import headstart
from servers import Json, RunningServer, eventually, said

KEEPER = "You keep the lighthouse. " * 20
PILOT = "You bring ships into the harbour. " * 20
MODEL = '[models]\ntoy = "toy:"\n'
SLOW = '[models]\ntoy = "toy:ms_per_token=3"\n'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "settings" / "headstart.toml"


def declare(config: Path, text: str, model: str = MODEL, top: str = "") -> None:
    config.parent.mkdir(exist_ok=True)
    config.write_text(f"{top}\n{model}\n{text}")


def cache(name: str, prompt: str, more: str = "") -> str:
    return f'[caches.{name}]\nprompt = "{prompt}"\n{more}\n'


def settled(server: RunningServer) -> Json:
    """The caches by name, once nothing is being built."""
    eventually(lambda: server.http.get("/v1/cache").json()["building"] == [])
    return {entry["cache_name"]: entry for entry in server.http.get("/v1/cache").json()["data"]}


def refused(config: Path, cache_dir: Path) -> str:
    """What a server that doesn't start says."""
    done = headstart("serve", "--port", "0", "--cache-dir", str(cache_dir), "--config", str(config))
    assert done.returncode == 1
    return done.stderr


def test_a_declared_cache_is_there_after_a_start(start_server: StartServer, config: Path) -> None:
    declare(config, cache("keeper", KEEPER))
    server = start_server("--config", str(config))
    answer = server.chat("Who?", use_cache="keeper")
    assert answer["usage"]["cache_hit"] is True
    assert said(answer) == said(server.chat("Who?", system=KEEPER, cache_prompt=False))
    (entry,) = settled(server).values()
    assert (entry["origin"], entry["version"]) == ("declared", 1)


def test_its_text_may_be_a_file_beside_the_configuration(start_server: StartServer, config: Path) -> None:
    declare(config, '[caches.keeper]\nfile = "texts/keeper.txt"\nfor = ["chat"]\n')
    (config.parent / "texts").mkdir()
    (config.parent / "texts" / "keeper.txt").write_text(KEEPER)
    server = start_server("--config", str(config))
    assert server.chat("Who?", use_cache="keeper")["usage"]["cache_hit"] is True
    shown = server.http.get("/v1/cache/toy/keeper").json()
    assert shown["prompt"] == KEEPER
    assert list(shown["forms"]) == ["chat"]


def test_it_is_for_the_first_model_unless_one_is_named(start_server: StartServer, config: Path) -> None:
    models = '[models]\none = "toy:"\ntwo = "toy:"\n'
    declare(config, cache("a", KEEPER) + cache("b", PILOT, 'model = "two"'), model=models)
    caches = settled(start_server("--config", str(config)))
    assert {name: entry["model"] for name, entry in caches.items()} == {"a": "one", "b": "two"}


def test_a_start_with_nothing_changed_computes_and_writes_nothing(
    start_server: StartServer, config: Path
) -> None:
    declare(config, cache("keeper", KEEPER) + cache("pilot", PILOT, "pinned = true\nttl_seconds = 9999"))
    server = start_server("--config", str(config))
    before = settled(server)
    server.restart()
    assert settled(server) == before
    assert "Building" not in server.log.read_text()


def test_a_changed_text_is_built_again_and_the_old_one_never_used(
    start_server: StartServer, config: Path
) -> None:
    declare(config, cache("keeper", KEEPER), SLOW)
    server = start_server("--config", str(config))
    settled(server)
    declare(config, cache("keeper", PILOT), SLOW)
    server.restart()
    answer = server.chat("Who?", use_cache="keeper")
    assert answer["usage"]["cache_hit"] is True
    assert said(answer) == said(server.chat("Who?", system=PILOT, cache_prompt=False))
    assert settled(server)["keeper"]["version"] == 2


def test_one_that_no_longer_fits_the_model_is_built_again_at_the_start(
    start_server: StartServer, config: Path
) -> None:
    declare(config, cache("keeper", KEEPER))
    server = start_server("--config", str(config))
    settled(server)
    declare(config, cache("keeper", KEEPER), MODEL.replace("toy:", "toy:weights=others"))
    server.restart()
    answer = server.chat("Who?", use_cache="keeper")
    assert answer["usage"]["cache_hit"] is True
    assert "cache_miss_reason" not in answer["usage"]


def test_changed_terms_are_kept_without_computing(start_server: StartServer, config: Path) -> None:
    declare(config, cache("keeper", KEEPER))
    server = start_server("--config", str(config))
    settled(server)
    declare(config, cache("keeper", KEEPER, "pinned = true"))
    server.restart()
    entry = settled(server)["keeper"]
    assert (entry["version"], entry["build_ms"]) == (2, 0)


def test_a_clients_cache_of_that_name_becomes_the_declared_one(
    start_server: StartServer, config: Path
) -> None:
    declare(config, "")
    server = start_server("--config", str(config))
    server.create("keeper", PILOT)
    declare(config, cache("keeper", KEEPER))
    server.restart()
    answer = server.chat("Who?", use_cache="keeper")
    assert said(answer) == said(server.chat("Who?", system=KEEPER, cache_prompt=False))
    assert settled(server)["keeper"]["origin"] == "declared"


def test_requests_wait_for_one_that_is_still_to_be_built(start_server: StartServer, config: Path) -> None:
    declare(config, cache("keeper", KEEPER) + cache("pilot", PILOT), SLOW)
    server = start_server("--config", str(config))
    building = {one["cache_name"] for one in server.http.get("/v1/cache").json()["building"]}
    assert "pilot" in building
    assert server.http.get("/health").json()["caches_building"] == len(building)
    assert server.chat("Who?", use_cache="pilot")["usage"]["cache_hit"] is True


def test_requests_for_others_are_answered_meanwhile(start_server: StartServer, config: Path) -> None:
    declare(config, cache("keeper", KEEPER), SLOW)
    server = start_server("--config", str(config))
    assert server.chat("Who?", max_tokens=1)["usage"]["completion_tokens"] <= 1
    assert server.http.get("/v1/cache").json()["building"]
    assert httpx.post(f"{server.url}/v1/cache/none", json={}).status_code in (400, 404)


def test_one_that_is_there_already_waits_for_no_build(start_server: StartServer, config: Path) -> None:
    declare(config, cache("keeper", KEEPER), SLOW)
    server = start_server("--config", str(config))
    settled(server)
    declare(config, cache("pilot", PILOT) + cache("keeper", KEEPER), SLOW)
    server.restart()
    assert server.chat("Who?", use_cache="keeper", max_tokens=1)["usage"]["cache_hit"] is True
    assert [one["cache_name"] for one in server.http.get("/v1/cache").json()["building"]] == ["pilot"]


def test_the_terminal_tells_of_each_build(start_server: StartServer, config: Path) -> None:
    declare(config, cache("keeper", KEEPER) + cache("pilot", PILOT))
    server = start_server("--config", str(config))
    settled(server)
    told = server.log.read_text()
    assert "Building cache keeper of toy (1 of 2)" in told
    assert "Building cache pilot of toy (2 of 2)" in told
    assert re.search(r"Built cache pilot of toy: \d+ tokens", told)


@pytest.mark.parametrize("verb", ["create", "delete"])
def test_a_client_can_neither_replace_nor_delete_it(
    start_server: StartServer, config: Path, verb: str
) -> None:
    declare(config, cache("keeper", KEEPER))
    server = start_server("--config", str(config))
    settled(server)
    if verb == "create":
        response = server.post("/v1/cache/toy", cache_name="keeper", prompt=PILOT)
    else:
        response = server.http.delete("/v1/cache/toy/keeper")
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "cache_conflict"
    assert "configuration" in response.json()["error"]["message"]
    assert settled(server)["keeper"]["version"] == 1


def test_what_is_declared_no_more_stays(start_server: StartServer, config: Path) -> None:
    declare(config, cache("keeper", KEEPER))
    server = start_server("--config", str(config))
    settled(server)
    declare(config, "")
    server.restart()
    assert server.chat("Who?", use_cache="keeper")["usage"]["cache_hit"] is True
    assert server.http.delete("/v1/cache/toy/keeper").status_code == 200


def test_with_prune_declared_it_goes_and_what_clients_made_stays(
    start_server: StartServer, config: Path
) -> None:
    declare(config, cache("keeper", KEEPER))
    server = start_server("--config", str(config))
    server.create("clients", PILOT)
    settled(server)
    declare(config, cache("pilot", PILOT), top="prune_declared = true")
    server.restart()
    assert set(settled(server)) == {"clients", "pilot"}
    assert "Deleted cache keeper of toy" in server.log.read_text()


def test_one_that_can_not_be_built_says_why_at_every_request(start_server: StartServer, config: Path) -> None:
    declare(config, cache("keeper", KEEPER), MODEL.replace("toy:", "toy:ctx=100"))
    server = start_server("--config", str(config))
    for _ in range(2):
        response = server.post(
            "/v1/chat/completions",
            model="toy",
            use_cache="keeper",
            messages=[{"role": "user", "content": "Who?"}],
        )
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "Cache keeper of toy can't be built" in server.log.read_text()


def test_a_worker_that_dies_during_a_build_is_waited_for(start_server: StartServer, config: Path) -> None:
    declare(config, cache("keeper", KEEPER), SLOW)
    server = start_server("--config", str(config))
    answers: list[Json] = []
    thread = threading.Thread(target=lambda: answers.append(_asked(server.url)))
    thread.start()
    time.sleep(0.2)
    server.workers()[0].send_signal(signal.SIGKILL)
    thread.join()
    assert answers[0]["usage"]["cached_prompts"] == ["keeper"]


def _asked(url: str) -> Json:
    body: dict[str, Any] = {"model": "toy", "use_cache": "keeper", "max_tokens": 1}
    body["messages"] = [{"role": "user", "content": "Who?"}]
    answer: Json = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    return answer


def test_a_server_killed_during_a_build_builds_it_at_the_next_start(
    start_server: StartServer, config: Path
) -> None:
    declare(config, cache("keeper", KEEPER), SLOW)
    server = start_server("--config", str(config))
    time.sleep(0.2)
    server.stop(signal.SIGKILL)
    server.start()
    assert server.chat("Who?", use_cache="keeper")["usage"]["cache_hit"] is True


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[caches.keeper]\nfile = "absent.txt"', ["keeper", "absent.txt", "No such file"]),
        ('[caches.keeper]\nfile = "headstart.bin"', ["keeper", "not UTF-8"]),
        ('[caches."../keeper"]\nprompt = "x"', ["../keeper", "not a name"]),
        ("[caches.keeper]\n", ["caches.keeper", "prompt and file"]),
        ('[caches.keeper]\nprompt = "x"\nmodel = "none"', ["keeper", "none", "not a model"]),
        ('[caches.keeper]\nprompt = "x"\nfor = ["poem"]', ["caches.keeper.for"]),
        ('[caches.keeper]\nprompt = "x"\nnonsense = 1', ["caches.keeper.nonsense"]),
    ],
)
def test_a_wrong_declaration_is_named_at_the_start(
    tmp_path: Path, config: Path, text: str, told: list[str]
) -> None:
    declare(config, text)
    (config.parent / "headstart.bin").write_bytes(b"\xff\xfe")
    error = refused(config, tmp_path / "cache")
    assert all(part in error for part in told), error
