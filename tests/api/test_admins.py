"""Work that touches others needs an admin's key; a key's own work doesn't."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

import headstart
from headstart.api.dialects import DIALECTS
from headstart.config.settings import Settings, load_settings
from servers import Json, RunningServer, eventually, running_server

COMMON = "You keep the lighthouse. " * 20
OWN = "You bring ships into the harbour. " * 20
SETTINGS = 'models = {toy = "toy:", other = "toy:"}\n'
KEYS = (
    '[keys.root]\nkey = "root-key"\nadmin = true\n[keys.ann]\nkey = "ann-key"\n[keys.bob]\nkey = "bob-key"\n'
)
DECLARED = f'[caches.declared]\nprompt = "{COMMON}"\n'
SECURITY = Path(headstart.__file__).parents[2] / "docs" / "security.md"


class Client:
    """A server as one key, or with "" none, sees it."""

    def __init__(self, server: RunningServer, name: str) -> None:
        self.server = server
        self.headers = {"authorization": f"Bearer {name}-key"} if name else {}

    def call(self, method: str, path: str, **more: Any) -> httpx.Response:
        return self.server.http.request(method, path, headers=self.headers, **more)

    def create(self, name: str, prompt: str = OWN) -> httpx.Response:
        return self.call("POST", "/v1/cache/toy", json={"cache_name": name, "prompt": prompt})

    def ask(self, **more: Any) -> httpx.Response:
        body = {"model": "toy", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 8, **more}
        return self.call("POST", "/v1/chat/completions", json=body)

    def listed(self, path: str = "/v1/cache") -> dict[str, Json]:
        return {cache["cache_name"]: cache for cache in self.call("GET", path).json()["data"]}

    def verify(self, **body: Any) -> httpx.Response:
        return self.call("POST", "/v1/verify", json=body)


def made_server(folder: Path) -> Iterator[RunningServer]:
    """With "common", which was made while there were no keys, and is everyone's."""
    config = folder / "headstart.toml"
    config.write_text(SETTINGS)
    with running_server(folder / "cache", "--config", str(config)) as server:
        server.create("common", COMMON)
        config.write_text(SETTINGS + KEYS + DECLARED)
        server.restart()
        root = Client(server, "root")
        eventually(lambda: root.call("GET", "/health").json()["caches_building"] == 0)
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    yield from made_server(tmp_path_factory.mktemp("admins"))


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[RunningServer]:
    """The same for tests that change what is everyone's."""
    yield from made_server(tmp_path)


def refused(response: httpx.Response) -> str:
    assert response.status_code == 403, response.text
    error = response.json()["error"]
    assert error["code"] == "admin_required"
    assert "admin" in error["message"]
    return str(error["message"])


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"force": True}])
def test_unloading_a_model_needs_an_admin(server: RunningServer, more: Json) -> None:
    root, bob = Client(server, "root"), Client(server, "bob")
    refused(bob.call("POST", "/v1/models/unload", json={"model": "toy", **more}))
    assert bob.ask().status_code == 200
    unloaded = root.call("POST", "/v1/models/unload", json={"model": "toy", **more})
    assert unloaded.json()["unloaded"] is True


@pytest.mark.parametrize(
    ("method", "body"), [("DELETE", None), ("PATCH", {"pinned": True}), ("PATCH", {"ttl_seconds": 0.01})]
)
def test_what_is_everyones_is_not_a_keys_to_change(server: RunningServer, method: str, body: Json) -> None:
    before = Client(server, "root").listed()["common"]
    refused(Client(server, "bob").call(method, "/v1/cache/toy/common", json=body))
    assert Client(server, "root").listed()["common"] == before


@pytest.mark.slow
def test_but_an_admins(fresh: RunningServer) -> None:
    root, bob = Client(fresh, "root"), Client(fresh, "bob")
    edited = root.call("PATCH", "/v1/cache/toy/common", json={"description": "for all"})
    assert edited.status_code == 200
    assert bob.listed()["common"]["description"] == "for all"
    assert root.call("DELETE", "/v1/cache/toy/common").status_code == 200
    assert "common" not in bob.listed()


@pytest.mark.slow
def test_an_admins_own_cache_goes_before_everyones(fresh: RunningServer) -> None:
    root, bob = Client(fresh, "root"), Client(fresh, "bob")
    assert root.create("common").json()["object"] == "cache.created"
    assert root.call("DELETE", "/v1/cache/toy/common").status_code == 200
    assert bob.listed()["common"]["owner"] is None


def test_what_is_declared_not_even_an_admin_deletes(server: RunningServer) -> None:
    for name in ("root", "bob"):
        response = Client(server, name).call("DELETE", "/v1/cache/toy/declared")
        assert response.json()["error"]["code"] == "cache_conflict"
    refused(Client(server, "bob").call("PATCH", "/v1/cache/toy/declared", json={"pinned": True}))


def test_a_key_creates_imports_and_saves_beside_what_is_everyones(server: RunningServer) -> None:
    bob = Client(server, "bob")
    prompt = Client(server, "ann").call("GET", "/v1/cache/toy/common").json()["prompt"]
    assert bob.create("common").status_code == 200
    content = bob.call("GET", "/v1/cache/toy/common/file").content
    assert bob.call("DELETE", "/v1/cache/toy/common").status_code == 200
    refused(bob.call("PUT", "/v1/cache/toy/common/file", content=content))
    taken = bob.call("PUT", "/v1/cache/toy/common/file?rebuild=true", content=content)
    assert taken.status_code == 200
    assert bob.ask(save_as="common", allow_overwrite=True).status_code == 200
    eventually(lambda: bob.listed()["common"]["origin"] == "conversation")
    assert Client(server, "ann").call("GET", "/v1/cache/toy/common").json()["prompt"] == prompt
    assert bob.call("DELETE", "/v1/cache/toy/common").status_code == 200


def test_ones_own_caches_are_ones_own_to_keep_verify_repair_and_delete(server: RunningServer) -> None:
    ann, bob = Client(server, "ann"), Client(server, "bob")
    assert ann.create("private").status_code == 200
    assert bob.create("mine").status_code == 200
    (server.cache_dir / "toy@bob" / "mine.headstart").write_bytes(b"damaged")
    (server.cache_dir / "toy@ann" / "stray.headstart").write_bytes(b"damaged")
    found = bob.verify(repair=True, remove_unreadable=True).json()
    assert {(verdict["cache_name"], verdict["owner"]) for verdict in found["data"]} == {("mine", "bob")}
    assert (server.cache_dir / "toy@ann" / "stray.headstart").exists()
    (server.cache_dir / "toy@ann" / "stray.headstart").unlink()
    assert bob.verify(cache_name="private", repair=True).status_code == 404
    assert bob.verify(cache_name="common", repair=True).status_code == 404
    assert bob.call("PATCH", "/v1/cache/toy/mine", json={"pinned": True}).status_code == 200
    assert bob.call("DELETE", "/v1/cache/toy/mine").status_code == 200
    assert ann.call("DELETE", "/v1/cache/toy/private").status_code == 200


@pytest.mark.slow
def test_an_admin_verifies_everything_and_is_told_whose_it_is(fresh: RunningServer) -> None:
    Client(fresh, "ann").create("private")
    (fresh.cache_dir / "toy@ann" / "stray.headstart").write_bytes(b"damaged")
    found = Client(fresh, "root").verify(repair=True, remove_unreadable=True).json()["data"]
    assert {(verdict["cache_name"], verdict["owner"], verdict["action"]) for verdict in found} == {
        ("common", None, None),
        ("declared", None, None),
        ("private", "ann", None),
        ("stray", "ann", "removed"),
    }


@pytest.mark.slow
def test_but_reads_no_others_caches(fresh: RunningServer) -> None:
    Client(fresh, "ann").create("private")
    root = Client(fresh, "root")
    assert "private" not in root.listed()
    for method, path in [("GET", ""), ("GET", "/file"), ("DELETE", ""), ("PATCH", "")]:
        body = {"pinned": True} if method == "PATCH" else None
        assert root.call(method, f"/v1/cache/toy/private{path}", json=body).status_code == 404
    assert root.ask(use_cache="private").status_code == 404


def test_health_tells_a_stranger_nothing_but_that_the_server_is_ready(server: RunningServer) -> None:
    assert Client(server, "").call("GET", "/health").json() == {"status": "ok"}
    wrong = httpx.get(f"{server.url}/health", headers={"authorization": "Bearer wrong"})
    assert wrong.json() == {"status": "ok"}
    known = Client(server, "bob").call("GET", "/health").json()
    assert known.keys() == {"status", "models", "caches_building"}


def test_nor_why_it_is_not_ready(start_server: Any, tmp_path: Path) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text('models = {toy = "toy:ms_per_token=40"}\n' + KEYS)
    server = start_server("--config", str(config))
    stranger, bob = Client(server, ""), Client(server, "bob")
    for worker in server.workers():
        worker.kill()
    eventually(lambda: stranger.call("GET", "/ready").status_code == 503)
    # Until the worker runs again.
    told = stranger.call("GET", "/ready")
    if told.status_code == 503:
        assert told.json()["error"].keys() == {"message", "type", "param", "code"}
    eventually(lambda: bob.call("GET", "/ready").status_code == 200)


def test_what_others_build_is_told_to_admins_only(start_server: Any, tmp_path: Path) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text('models = {toy = "toy:ms_per_token=4"}\n' + KEYS)
    server = start_server("--config", str(config))
    building_one = threading.Thread(target=lambda: Client(server, "ann").create("private", COMMON * 3))
    building_one.start()
    eventually(lambda: Client(server, "root").call("GET", "/health").json()["caches_building"] == 1)
    building = {
        name: Client(server, name).call("GET", "/health").json().get("caches_building")
        for name in ("root", "ann", "bob", "")
    }
    building_one.join()
    assert building == {"root": 1, "ann": 1, "bob": 0, "": None}


def test_how_others_use_what_is_everyones_is_told_to_admins_only(server: RunningServer) -> None:
    assert Client(server, "ann").ask(use_cache="common").status_code == 200
    root, bob = Client(server, "root"), Client(server, "bob")
    eventually(lambda: root.listed()["common"]["hits"] > 0)
    for cache in (bob.listed()["common"], bob.call("GET", "/v1/cache/toy/common").json()):
        for field in ("hits", "last_used", "tokens_saved", "seconds_saved"):
            assert cache[field] is None
        assert cache["unverified"] is False
    assert bob.create("mine").status_code == 200
    assert bob.listed()["mine"]["hits"] == 0
    assert bob.call("DELETE", "/v1/cache/toy/mine").status_code == 200


def test_evictions_of_others_caches_are_told_to_admins_only(start_server: Any, tmp_path: Path) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text(SETTINGS + KEYS.replace('"ann-key"', '"ann-key"\nquota_mb = 0.03'))
    server = start_server("--config", str(config))
    for i in range(4):
        assert Client(server, "ann").create(f"c{i}", f"{i}: {COMMON * 2}").status_code == 200
    evictions = {
        name: Client(server, name).call("GET", "/v1/cache").json()["evictions"]
        for name in ("root", "ann", "bob")
    }
    assert evictions["ann"] == evictions["root"] > 0
    assert evictions["bob"] == 0


def test_a_route_before_a_public_path_opens_nothing(start_server: Any, tmp_path: Path) -> None:
    config = tmp_path / "headstart.toml"
    routes = '[routes]\n"/docs/files" = "common"\n"/docs" = "common"\n'
    config.write_text(SETTINGS + KEYS + routes)
    server = start_server("--config", str(config))
    for prefix in ("/docs/files", "/docs", "/docs/files/x"):
        assert server.http.get(f"{prefix}/v1/models").status_code in (401, 404), prefix


@pytest.mark.parametrize(
    ("keys", "admins"),
    [
        ("", set()),
        ('[keys.a]\nkey = "1"\n', {"a"}),
        ('[keys.a]\nkey = "1"\nadmin = false\n', set()),
        ('[keys.a]\nkey = "1"\n[keys.b]\nkey = "2"\n', set()),
        ('[keys.a]\nkey = "1"\nadmin = true\n[keys.b]\nkey = "2"\n', {"a"}),
    ],
)
def test_a_key_is_an_admins_if_it_says_so_or_is_the_only_one(
    tmp_path: Path, keys: str, admins: set[str]
) -> None:
    (tmp_path / "headstart.toml").write_text(SETTINGS + keys)
    settings: Settings = load_settings(tmp_path / "headstart.toml")
    assert settings.admins == admins


def test_without_keys_everything_is_allowed(start_server: Any) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("common", COMMON)
    assert server.http.patch("/v1/cache/toy/common", json={"pinned": True}).status_code == 200
    assert server.post("/v1/verify", repair=True).json()["checked"] == 1
    assert server.http.delete("/v1/cache/toy/common").status_code == 200
    assert server.post("/v1/models/unload", model="toy", force=True).status_code == 200
    assert "models" in server.http.get("/health").json()


@pytest.mark.slow
def test_the_command_line_says_that_it_needs_an_admins_key(server: RunningServer) -> None:
    for command in (["model", "unload", "toy"], ["cache", "delete", "common", "--model", "toy"]):
        done = subprocess.run(
            [sys.executable, "-m", "headstart", *command, "--url", server.url],
            env={**os.environ, "HEADSTART_API_KEY": "bob-key"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert "needs the API key of an admin" in " ".join(done.stderr.split())


def documented() -> dict[str, str]:
    """The users of each route by docs/security.md."""
    rows = [line.split("|") for line in SECURITY.read_text().splitlines() if line.startswith("| `")]
    return {route.strip(): row[2].strip() for row in rows if len(row) > 3 for route in row[1].split(",")}


def routes() -> list[str]:
    found = [
        route
        for dialect in DIALECTS
        for router in dialect.routers
        for route in router.routes
        if isinstance(route, APIRoute)
    ]
    plain = [(route.methods, route.path.replace(":path}", "}")) for route in found]
    return [f"`{method} {path}`" for methods, path in plain for method in methods or ()]


def test_of_every_route_it_is_decided_who_may_use_it() -> None:
    decisions = documented()
    assert len(routes()) > 20
    for route in routes():
        assert decisions.get(route, "").startswith(("anybody", "any key", "own", "admin")), route


FILLED = {"{model}": "toy", "{name}": "common", "{response_id}": "resp_0"}


@pytest.mark.parametrize("route", [r for r in routes() if documented().get(r, "").startswith("admin")])
def test_what_is_for_admins_by_the_documents_is_for_them(server: RunningServer, route: str) -> None:
    method, path = route.strip("`").split()
    for name, value in FILLED.items():
        path = path.replace(name, value)
    refused(Client(server, "bob").call(method, path, json={"model": "toy"}))


@pytest.mark.parametrize("route", [r for r in routes() if not documented().get(r, "").startswith("anybody")])
def test_what_is_not_for_anybody_by_the_documents_needs_a_key(server: RunningServer, route: str) -> None:
    method, path = route.strip("`").split()
    for name, value in FILLED.items():
        path = path.replace(name, value)
    assert Client(server, "").call(method, path).status_code == 401
