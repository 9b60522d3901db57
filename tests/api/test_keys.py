"""API keys: who may use the server, and whose caches are whose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AuthenticationError, OpenAI

from conftest import StartServer
from driver import Driver
from forkserver import headstart
from headstart.config.settings import load_settings
from headstart.engine.toy import ToyModel
from headstart.protocol import EngineSettings
from servers import Json, RunningServer, eventually, running_server, said

KEEPER = "You keep the lighthouse. " * 20
PILOT = "You bring ships into the harbour. " * 20
KEYS = {"ann": "ann-secret", "bob": "bob-secret"}

CONFIG = f"""
models = {{toy = "toy:"}}
automatic_after = 2
[keys.ann]
key = "ann-secret"
[keys.bob]
key_env = "BOBS_KEY"
cache = "shared"
quota_mb = 2.5
[routes]
"/pilots" = "pilot"
[caches.shared]
prompt = "{KEEPER}"
[caches.pilot]
prompt = "{PILOT}"
"""

Body = dict[str, Any]


class Client:
    """What one key sees of a server."""

    def __init__(self, server: RunningServer, name: str) -> None:
        self.headers = {"authorization": f"Bearer {KEYS[name]}"}
        self.server = server

    def call(self, method: str, path: str, **more: Any) -> httpx.Response:
        return self.server.http.request(method, path, headers=self.headers, **more)

    def create(self, name: str, prompt: str) -> httpx.Response:
        return self.call("POST", "/v1/cache/toy", json={"cache_name": name, "prompt": prompt})

    def ask(self, text: str = "Who?", system: str = "", path: str = "", **more: Any) -> httpx.Response:
        opening = [{"role": "system", "content": system}] if system else []
        body: Body = {"model": "toy", "temperature": 0, "max_tokens": 24}
        body["messages"] = [*opening, {"role": "user", "content": text}]
        return self.call("POST", f"{path}/v1/chat/completions", json=body | more)

    def cached(self, *args: Any, **more: Any) -> int:
        answer: Json = self.ask(*args, **more).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    def names(self) -> dict[str, str | None]:
        """The caches listed, each with its owner."""
        listed = self.call("GET", "/v1/cache/toy").json()["data"]
        assert listed == self.call("GET", "/v1/cache").json()["data"]
        return {entry["cache_name"]: entry["owner"] for entry in listed}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "headstart.toml").write_text(CONFIG)
    flags = ("--config", str(folder / "headstart.toml"))
    with running_server(folder / "cache", *flags, env={"BOBS_KEY": KEYS["bob"]}) as server:
        eventually(lambda: Client(server, "ann").call("GET", "/health").json()["caches_building"] == 0)
        yield server


@pytest.fixture
def ann(server: RunningServer) -> Client:
    return Client(server, "ann")


@pytest.fixture
def bob(server: RunningServer) -> Client:
    return Client(server, "bob")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/pilots/v1/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/cache"),
        ("POST", "/v1/cache/toy"),
        ("GET", "/v1/cache/toy/shared"),
        ("DELETE", "/v1/cache/toy/shared"),
        ("POST", "/v1/responses"),
        ("GET", "/v1/responses/resp_0"),
        ("POST", "/v1/embeddings"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("POST", "/apply-template"),
        ("GET", "/nothing"),
    ],
)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic ann-secret"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer ann"},
        {"x-api-key": "ann-secre"},
        {"authorization": "Bearer ann-secret\u00e9"},
    ],
    ids=range(7),
)
def test_everything_needs_a_key(
    server: RunningServer, method: str, path: str, headers: dict[str, str]
) -> None:
    sent = {name: value.encode("latin-1") for name, value in headers.items()}
    response = server.http.request(method, path, headers=sent)  # type: ignore[arg-type]
    assert response.status_code == 401
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]


def test_but_health_does_not(server: RunningServer) -> None:
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer ann-secret"},
        {"authorization": "bearer ann-secret"},
        {"x-api-key": "ann-secret"},
    ],
)
def test_a_key_opens_the_server(server: RunningServer, headers: dict[str, str]) -> None:
    assert server.http.get("/v1/models", headers=headers).status_code == 200


def test_openais_client_works_with_the_key_and_says_so_without(server: RunningServer) -> None:
    assert list(OpenAI(base_url=f"{server.url}/v1", api_key="ann-secret").models.list())
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=f"{server.url}/v1", api_key="other").models.list()


def test_a_keys_caches_are_not_there_for_another(ann: Client, bob: Client) -> None:
    assert ann.create("private", "I am Ann. " * 30).status_code == 200
    assert ann.ask(use_cache="private").json()["usage"]["cache_hit"] is True
    assert ann.names()["private"] == "ann"
    assert "private" not in bob.names()
    models = [model["id"] for model in bob.call("GET", "/v1/models").json()["data"]]
    assert "toy@private" not in models
    for response in (
        bob.ask(use_cache="private"),
        bob.ask(model="toy@private"),
        bob.call("GET", "/v1/cache/toy/private"),
        bob.call("DELETE", "/v1/cache/toy/private"),
        bob.call("GET", "/v1/models/toy@private"),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "cache_not_found"
    assert ann.call("DELETE", "/v1/cache/toy/private").status_code == 200


def test_two_keys_may_have_caches_of_the_same_name(ann: Client, bob: Client) -> None:
    for client, prompt in ((ann, "I am Ann. " * 30), (bob, "I am Bob. " * 30)):
        assert client.create("mine", prompt).json()["object"] == "cache.created"
    for client, prompt in ((ann, "I am Ann. " * 30), (bob, "I am Bob. " * 30)):
        named = client.ask(use_cache="mine").json()
        assert named["usage"]["cache_hit"] is True
        assert said(named) == said(ann.ask(system=prompt, cache_prompt=False).json())
        assert client.call("GET", "/v1/cache/toy/mine").json()["prompt"] == prompt
        assert client.call("DELETE", "/v1/cache/toy/mine").status_code == 200


def test_what_is_everyones_may_be_used_and_listed_but_not_deleted(ann: Client, bob: Client) -> None:
    for client in (ann, bob):
        assert client.ask(use_cache="shared").json()["usage"]["cache_hit"] is True
        assert client.names()["shared"] is None
        assert client.call("GET", "/v1/cache/toy/shared").json()["prompt"] == KEEPER
        response = client.call("DELETE", "/v1/cache/toy/shared")
        assert response.json()["error"]["code"] == "cache_conflict"


def test_creating_a_name_that_is_everyones_makes_ones_own(ann: Client, bob: Client) -> None:
    assert ann.create("pilot", "I am Ann. " * 30).json()["object"] == "cache.created"
    assert (ann.names()["pilot"], bob.names()["pilot"]) == ("ann", None)
    assert said(ann.ask(use_cache="pilot").json()) != said(bob.ask(use_cache="pilot").json())
    assert ann.call("DELETE", "/v1/cache/toy/pilot").status_code == 200
    assert said(ann.ask(use_cache="pilot").json()) == said(bob.ask(use_cache="pilot").json())


def test_a_keys_default_cache_is_used_where_nothing_else_is_named(ann: Client, bob: Client) -> None:
    assert "cached_prompts" not in ann.ask().json()["usage"]
    assert bob.ask().json()["usage"]["cached_prompts"] == ["shared"]
    assert bob.ask(path="/pilots").json()["usage"]["cached_prompts"] == ["pilot"]
    assert bob.ask(model="toy@pilot").json()["usage"]["cached_prompts"] == ["pilot"]
    assert bob.ask(use_cache="pilot").json()["usage"]["cached_prompts"] == ["pilot"]


def test_what_one_key_asked_is_never_reused_for_another(ann: Client, bob: Client) -> None:
    secret = "The code of the gate is 4711. " * 3
    bobs = {"use_cache": "pilot"}
    ann.ask(secret, use_cache="pilot")
    opening = ann.cached("Other", use_cache="pilot")
    assert ann.cached(secret, use_cache="pilot") >= opening
    assert bob.cached(secret, **bobs) == opening
    assert bob.cached(secret, **bobs) >= opening


def test_a_system_prompt_of_one_key_is_computed_anew_for_another(
    start_server: StartServer, tmp_path: Path
) -> None:
    (tmp_path / "headstart.toml").write_text(
        'automatic = false\n[models]\ntoy = "toy:"\n'
        '[keys.ann]\nkey = "ann-secret"\n[keys.bob]\nkey = "bob-secret"\n'
    )
    server = start_server("--config", str(tmp_path / "headstart.toml"))
    ann, bob = Client(server, "ann"), Client(server, "bob")
    assert ann.cached(system=KEEPER) == 0
    assert ann.cached(system=KEEPER) > 0
    assert bob.cached(system=KEEPER) == 0
    assert bob.cached(system=KEEPER) > 0


def test_automatic_caches_belong_to_the_key_they_came_from(ann: Client, bob: Client) -> None:
    system = "You are Ann's own helper. " * 20
    for _ in range(2):
        ann.ask(system=system)
    eventually(lambda: any(name.startswith("auto-") for name in ann.names()))
    assert not any(name.startswith("auto-") for name in bob.names())


@pytest.fixture
def toy_engine() -> Driver:
    return Driver(ToyModel(EngineSettings("toy:", 3, 256)))


@pytest.mark.parametrize(
    ("owner", "public", "shared"), [("ann", 0, True), ("bob", 0, False), ("bob", 64, True)]
)
def test_slots_are_shared_by_owner_or_what_is_public(
    toy_engine: Driver, owner: str, public: int, shared: bool
) -> None:
    opening = list(range(64))
    toy_engine.run([*opening, 70, 71, 72], boundary=64, owner="ann")
    _, end = toy_engine.run([*opening, 70, 71, 99], boundary=64, owner=owner, public=public)
    assert end.stats.cached_tokens == (64 if shared else 0)


@pytest.mark.parametrize(("owners", "cached"), [(["ann", "ann"], [0, 64]), (["ann", "bob"], [0, 0])])
def test_running_requests_share_nothing_with_another_owners(
    toy_engine: Driver, owners: list[str], cached: list[int]
) -> None:
    opening = list(range(64))
    prompts = [[*opening, n] for n in (1, 2)]
    alone = [toy_engine.run(prompt, boundary=64, reuse=False)[0] for prompt in prompts]
    toy_engine.evict()
    requests = [
        toy_engine.submit(prompt, boundary=64, owner=owner)
        for prompt, owner in zip(prompts, owners, strict=True)
    ]
    toy_engine.finish()
    assert [toy_engine.tokens(request) for request in requests] == alone
    assert [toy_engine.end(request).stats.cached_tokens for request in requests] == cached


def test_a_keys_caches_are_its_own_after_a_restart_too(start_server: StartServer, tmp_path: Path) -> None:
    (tmp_path / "headstart.toml").write_text(CONFIG)
    server = start_server("--config", str(tmp_path / "headstart.toml"), env={"BOBS_KEY": KEYS["bob"]})
    assert Client(server, "ann").create("private", PILOT).status_code == 200
    server.restart()
    ann, bob = Client(server, "ann"), Client(server, "bob")
    assert ann.ask(use_cache="private").json()["usage"]["cache_hit"] is True
    assert bob.ask(use_cache="private").status_code == 404
    assert "toy@ann/private.headstart" in server.files()


def test_what_was_made_without_keys_is_everyones_and_what_was_made_with_one_is_hidden_without(
    start_server: StartServer, tmp_path: Path
) -> None:
    config, cache_dir = tmp_path / "headstart.toml", tmp_path / "cache"
    config.write_text('models = {toy = "toy:"}\n')
    server = start_server("--config", str(config))
    server.create("before", KEEPER)
    config.write_text('models = {toy = "toy:"}\n[keys.ann]\nkey = "ann-secret"\n')
    server.restart()
    ann = Client(server, "ann")
    assert ann.ask(use_cache="before").json()["usage"]["cache_hit"] is True
    assert ann.create("private", PILOT).status_code == 200
    config.write_text('models = {toy = "toy:"}\n')
    server.restart()
    assert [e["cache_name"] for e in server.http.get("/v1/cache").json()["data"]] == ["before"]
    assert (cache_dir / "toy@ann" / "private.headstart").exists()


def test_the_command_line_takes_its_key_from_the_environment(server: RunningServer) -> None:
    command = ("cache", "list", "--url", server.url)
    assert "shared" in headstart(*command, HEADSTART_API_KEY="ann-secret").stdout
    refused = headstart(*command)
    assert refused.returncode == 1
    assert "API key" in refused.stderr


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[..., str]:
    def refuse(text: str, *flags: str) -> str:
        (tmp_path / "headstart.toml").write_text('models = {toy = "toy:"}\n' + text)
        files = ("--config", str(tmp_path / "headstart.toml"), "--cache-dir", str(tmp_path / "cache"))
        done = headstart("serve", "--port", "0", *files, *flags)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return done.stderr

    return refuse


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[keys.ann]\nkey = ""', "'ann' is empty"),
        ('[keys.ann]\nkey = "a b"', "visible ASCII"),
        ('[keys.ann]\nkey_env = "ABSENT_KEY"', "'ann' is empty"),
        ('[keys.ann]\nkey_file = "absent"', "'ann' can't be read"),
        ("[keys.ann]\n", "one of key, key_file and key_env"),
        ('[keys.ann]\nkey = "x"\nkey_env = "X"', "one of key, key_file and key_env"),
        ('[keys."a b"]\nkey = "x"', "not a name"),
        ('[keys.ann]\nkey = "x"\ncache = "a/b"', "not a name"),
        ('[keys.ann]\nkey = "same"\n[keys.bob]\nkey = "same"', "'ann' and 'bob' are the same"),
    ],
)
def test_a_wrong_key_is_named_at_the_start(refusal: Callable[..., str], text: str, told: str) -> None:
    error = refusal(text)
    assert told in error
    assert "same\n" not in error


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", ""])
def test_others_are_not_let_in_without_a_key(refusal: Callable[..., str], host: str) -> None:
    assert "--insecure" in refusal("", "--host", host)


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("", ["--insecure"]),
        ("allow_public = true", []),
        ('[keys.ann]\nkey = "x"', []),
    ],
)
def test_unless_it_is_wanted_or_there_is_a_key(
    refusal: Callable[..., str], text: str, flags: list[str]
) -> None:
    # No machine has this address: what is left to fail is listening on it.
    assert "Can't listen" in refusal(text, "--host", "192.0.2.1", *flags)


def test_a_key_may_come_from_a_file_beside_the_configuration(
    start_server: StartServer, tmp_path: Path
) -> None:
    (tmp_path / "headstart.toml").write_text('models = {toy = "toy:"}\n[keys.ann]\nkey_file = "key.txt"\n')
    (tmp_path / "key.txt").write_text("ann-secret\n")
    server = start_server("--config", str(tmp_path / "headstart.toml"))
    assert Client(server, "ann").call("GET", "/v1/models").status_code == 200


def test_quotas_are_known_in_bytes_and_keys_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "headstart.toml").write_text(CONFIG)
    settings = load_settings(tmp_path / "headstart.toml")
    assert settings.quotas == {"bob": 2_500_000}
    assert "ann-secret" not in repr(settings)


def test_a_key_has_a_quota_of_its_own_and_gives_up_none_but_its_own_states(
    start_server: StartServer, tmp_path: Path
) -> None:
    config = tmp_path / "quota.toml"
    keys = '[keys.ann]\nkey = "ann-secret"\n[keys.bob]\nkey = "bob-secret"\nquota_mb = 0.03\n'
    config.write_text('models = {toy = "toy:"}\n' + keys)
    server = start_server("--config", str(config))
    ann, bob = Client(server, "ann"), Client(server, "bob")
    for i in range(4):
        for client in (ann, bob):
            assert client.create(f"c{i}", f"{i}: {KEEPER * 2}").status_code == 200
    evicted = {
        client: [
            cache["cache_name"]
            for cache in client.call("GET", "/v1/cache").json()["data"]
            if cache["evicted"]
        ]
        for client in (ann, bob)
    }
    assert evicted[ann] == []
    assert evicted[bob]
    assert "c3" not in evicted[bob]
    totals = bob.call("GET", "/v1/cache").json()
    assert totals["used_bytes"] <= totals["quota_bytes"] == 30_000
    refused = bob.create("vast", f"vast: {KEEPER * 7}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "quota_exceeded")
    assert bob.ask(use_cache=evicted[bob][0]).json()["usage"]["cache_miss_reason"] == "evicted"
