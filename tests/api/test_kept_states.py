"""The state store's content is told to admins, and emptied by whom it belongs to; named caches stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from blocks import directory, header, write_chain
from conftest import StartServer
from headstart.cli.main import app
from headstart.engine.states.directory import usage
from headstart.service.models.state_limits import states_directory
from servers import Json, RunningServer, eventually, running_server

PROMPT = "You keep the lighthouse. " * 20
NOBODY = "http://127.0.0.1:1"
TOKENS = list(range(100, 112))
LIMITS = {"HEADSTART_STATE_MEMORY_MB": "50", "HEADSTART_STATE_DISK_MB": "500"}
CONFIG = """
models = {toy = "toy:", other = "toy:weights=other"}
[keys.root]
key = "root-key"
admin = true
[keys.ann]
key = "ann-key"
"""


def place(server: RunningServer, model: str = "other") -> Path:
    return states_directory(server.cache_dir) / model


def fill(server: RunningServer) -> None:
    """Three chains of a model that isn't loaded, of nobody, of ann and of root."""
    write_chain(directory(place(server)), TOKENS)
    write_chain(directory(place(server)), TOKENS, owner="ann")
    write_chain(directory(place(server)), TOKENS, header([5, 6]), owner="root")
    write_chain(directory(place(server)), [5, 6])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    flags = ("--model", "toy=toy:", "--model", "other=toy:weights=other")
    with running_server(tmp_path / "cache", *flags, env=LIMITS) as server:
        yield server


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[RunningServer]:
    (tmp_path / "headstart.toml").write_text(CONFIG)
    flags = ("--config", str(tmp_path / "headstart.toml"))
    with running_server(tmp_path / "cache", *flags, env=LIMITS) as server:
        yield server


def call(server: RunningServer, key: str, method: str, path: str, **more: Any) -> httpx.Response:
    return server.http.request(method, path, headers={"authorization": f"Bearer {key}-key"}, **more)


def unload(server: RunningServer, model: str = "toy") -> None:
    """Its worker has written then all that it may."""
    eventually(lambda: server.post("/v1/models/unload", model=model).status_code == 200)


def store(server: RunningServer, model: str = "") -> Json:
    found: Json = server.http.get("/v1/cache" + (f"/{model}" if model else "")).json()["store"]
    return found


def test_the_store_tells_what_it_holds_and_may_hold(server: RunningServer) -> None:
    fill(server)
    n_bytes, tokens, chains = usage(place(server))
    assert n_bytes > 0
    other = store(server, "other")
    assert other["memory"] == {"bytes": 0, "tokens": 0, "limit_bytes": 0}
    assert other["disk"] == {"bytes": n_bytes, "tokens": tokens, "limit_bytes": 0}
    assert (other["chains"], other["evictions"]) == (chains, 0)
    assert store(server)["memory"]["limit_bytes"] == 50_000_000
    assert store(server)["disk"]["limit_bytes"] == 500_000_000
    assert store(server)["disk"]["bytes"] >= n_bytes


def test_hits_are_counted_by_where_the_state_lay(server: RunningServer) -> None:
    server.create("keeper", PROMPT)
    sources = [
        server.chat("Who?", use_cache="keeper")["timings"]["cache_source"],
        server.chat("Who are you?", system=PROMPT)["timings"]["cache_source"],
        server.chat("?", cache_prompt=False)["timings"]["cache_source"],
    ]
    expected = {source: sources.count(source) for source in ("slot", "memory", "disk", "file")}
    assert sum(expected.values()) == 2
    assert store(server)["hits"] == store(server, "toy")["hits"] == expected
    assert not any(store(server, "other")["hits"].values())


def test_emptying_the_store_leaves_named_caches(server: RunningServer) -> None:
    server.create("keeper", PROMPT, model="other")
    server.post("/v1/models/unload", model="other").raise_for_status()
    fill(server)
    answer = server.http.delete("/v1/cache", params={"model": "toy"})
    assert answer.json() == {"object": "cache.cleared", "model": "toy", "cleared": True}
    assert usage(place(server)).n_bytes > 0
    answer = server.http.delete("/v1/cache")
    assert answer.json() == {"object": "cache.cleared", "model": None, "cleared": True}
    assert usage(place(server)) == (0, 0, 0)
    assert store(server)["disk"]["bytes"] == store(server)["memory"]["bytes"] == 0
    assert server.http.get("/v1/cache/other/keeper").status_code == 200
    assert server.chat("Who?", model="other", use_cache="keeper")["usage"]["cache_hit"] is True


def test_a_model_that_is_not_there_can_not_be_cleared(server: RunningServer) -> None:
    assert server.http.delete("/v1/cache", params={"model": "absent"}).status_code == 404


def test_a_key_empties_what_is_its_own_and_an_admin_everything(keyed: RunningServer) -> None:
    fill(keyed)
    before = usage(place(keyed))
    for path in ("/v1/cache", "/v1/cache/other"):
        assert call(keyed, "ann", "GET", path).json()["store"] is None
        assert call(keyed, "root", "GET", path).json()["store"]["disk"]["bytes"] >= before.n_bytes
    assert call(keyed, "ann", "DELETE", "/v1/cache").status_code == 200
    left = usage(place(keyed))
    assert left.tokens == before.tokens - len(TOKENS)
    assert call(keyed, "ann", "DELETE", "/v1/cache").status_code == 200
    assert usage(place(keyed)) == left
    assert call(keyed, "root", "DELETE", "/v1/cache", params={"model": "other"}).status_code == 200
    assert usage(place(keyed)) == (0, 0, 0)


def test_what_was_not_used_for_days_is_deleted(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:", "--model", "other=toy:weights=other")
    server.stop()
    write_chain(directory(place(server)), TOKENS, used=1.0)
    write_chain(directory(place(server)), [5, 6])
    server.start()
    eventually(lambda: usage(place(server)).tokens == 2)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": PROMPT, "store": False}),
        ("/v1/responses", {"input": PROMPT, "store": False, "cache_prompt": False}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "cache_prompt": False}),
        ("/v1/completions", {"prompt": PROMPT, "cache_prompt": False}),
    ],
)
def test_a_request_can_stay_off_the_disk(server: RunningServer, path: str, body: Json) -> None:
    server.post(path, model="toy", **body).raise_for_status()
    unload(server)
    assert usage(place(server, "toy")) == (0, 0, 0)
    kept = {name: value for name, value in body.items() if name not in ("store", "cache_prompt")}
    server.post(path, model="toy", **kept).raise_for_status()
    unload(server)
    assert usage(place(server, "toy")).tokens > 100


def command(server_url: str, *arguments: str, stdin: str = "") -> Result:
    environment = {"HEADSTART_URL": server_url, "COLUMNS": "80"}
    return CliRunner().invoke(app, ["cache", "clear", *arguments], input=stdin, env=environment)


def test_the_command_asks_first_and_lets_the_server_empty_the_store(server: RunningServer) -> None:
    fill(server)
    before = usage(place(server))
    assert command(server.url, stdin="n\n").exit_code == 1
    assert command(server.url, "--model", "toy", "--yes").exit_code == 0
    assert usage(place(server)) == before
    done = command(server.url, "--model", "other", stdin="y\n")
    assert done.exit_code == 0, done.output
    assert "Emptied the state store of other" in done.output
    assert usage(place(server)) == (0, 0, 0)


def test_the_command_works_without_a_server_and_not_beside_one(server: RunningServer) -> None:
    server.create("keeper", PROMPT)
    fill(server)
    beside = command(NOBODY, "--yes", "--cache-dir", str(server.cache_dir))
    assert beside.exit_code == 1
    assert "Another Headstart server" in beside.output
    server.stop()
    assert usage(place(server)).n_bytes > 0
    assert command(NOBODY, "--yes", "--cache-dir", str(server.cache_dir / "absent")).exit_code == 1
    done = command(NOBODY, "--yes", "--cache-dir", str(server.cache_dir))
    assert done.exit_code == 0, done.output
    assert usage(place(server)) == (0, 0, 0)
    assert usage(place(server, "toy")) == (0, 0, 0)
    server.start()
    assert server.chat("Who?", use_cache="keeper")["usage"]["cache_hit"] is True
