"""Clients that can't say `use_cache` choose a cache by the model's name, or by the address."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from forkserver import headstart
from servers import RunningServer, running_server, said

KEEPER = "You keep the lighthouse. " * 20
PILOT = "You bring ships into the harbour. " * 20

CONFIG = """
[models]
toy = "toy:"

[aliases]
gpt-4o = "toy@pilot"
plain = "toy"
broken = "toy@absent"

[routes]
"/coding" = "keeper"
"/coding/pilots" = "pilot"
"/api/none" = "absent"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("routes")
    (folder / "headstart.toml").write_text(CONFIG)
    with running_server(folder / "cache", "--config", str(folder / "headstart.toml")) as server:
        server.create("keeper", KEEPER)
        server.create("pilot", PILOT)
        yield server


def ask(server: RunningServer, model: str = "toy", path: str = "", **more: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "Who?"}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 24}
    return server.post(f"{path}/v1/chat/completions", **body, **more)


def names(server: RunningServer) -> list[str]:
    return [model["id"] for model in server.http.get("/v1/models").json()["data"]]


def test_a_models_name_may_name_its_cache_too(server: RunningServer) -> None:
    answer = ask(server, "toy@keeper").json()
    assert answer["usage"]["cached_prompts"] == ["keeper"]
    assert answer["model"] == "toy@keeper"
    assert said(answer) == said(server.chat("Who?", use_cache="keeper"))


def test_a_completions_model_may_do_so_too(server: RunningServer) -> None:
    answer = server.post("/v1/completions", model="toy@keeper", prompt="", max_tokens=3).json()
    assert answer["usage"]["cached_prompts"] == ["keeper"]


def test_a_stream_from_such_a_model_hits_the_cache(server: RunningServer) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model="toy@keeper",
        messages=[{"role": "user", "content": "Who?"}],
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=5,
    )
    last = list(stream)[-1]
    assert last.usage is not None
    assert last.usage.model_dump()["cached_prompts"] == ["keeper"]


def test_an_alias_may_stand_for_a_model_with_a_cache(server: RunningServer) -> None:
    assert ask(server, "gpt-4o").json()["usage"]["cached_prompts"] == ["pilot"]
    assert ask(server, "gpt-4o@keeper").json()["usage"]["cached_prompts"] == ["keeper"]
    assert ask(server, "plain@keeper").json()["usage"]["cached_prompts"] == ["keeper"]
    assert "cached_prompts" not in ask(server, "plain").json()["usage"]


def test_every_path_below_a_route_starts_from_its_cache(server: RunningServer) -> None:
    assert ask(server, path="/coding").json()["usage"]["cached_prompts"] == ["keeper"]
    answer = server.post("/coding/v1/completions", model="toy", prompt="Who?", max_tokens=3).json()
    assert answer["usage"]["cached_prompts"] == ["keeper"]
    assert server.http.get("/coding/v1/models").json() == server.http.get("/v1/models").json()


def test_openais_client_needs_nothing_but_another_address(server: RunningServer) -> None:
    client = OpenAI(base_url=f"{server.url}/coding/v1", api_key="none")
    answer = client.chat.completions.create(model="toy", messages=[{"role": "user", "content": "Who?"}])
    assert answer.usage is not None
    assert answer.usage.model_dump()["cached_prompts"] == ["keeper"]


def test_of_two_routes_the_longer_one_counts(server: RunningServer) -> None:
    assert ask(server, path="/coding/pilots").json()["usage"]["cached_prompts"] == ["pilot"]


def test_use_cache_wins_over_the_models_name_and_that_over_the_route(server: RunningServer) -> None:
    both = ask(server, "toy@pilot", "/coding", use_cache="keeper").json()
    assert both["usage"]["cached_prompts"] == ["keeper"]
    assert ask(server, "toy@pilot", "/coding").json()["usage"]["cached_prompts"] == ["pilot"]


@pytest.mark.parametrize(("model", "path"), [("toy@absent", ""), ("broken", ""), ("toy", "/api/none")])
def test_a_cache_that_does_not_exist_is_an_error_however_it_was_named(
    server: RunningServer, model: str, path: str
) -> None:
    response = ask(server, model, path)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "cache_not_found"


@pytest.mark.parametrize("model", ["toy@", "toy@@keeper", "toy@a/b"])
def test_what_is_no_name_of_a_cache_is_refused(server: RunningServer, model: str) -> None:
    assert ask(server, model).json()["error"]["code"] == "invalid_cache_name"


def test_an_unknown_model_is_one_with_a_cache_too(server: RunningServer) -> None:
    assert ask(server, "none@keeper").json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/codingv1/v1", "/cod/v1", "/coding/x/v1", "/coding"])
def test_other_paths_lead_nowhere(server: RunningServer, path: str) -> None:
    assert server.post(f"{path}/chat/completions", model="toy").status_code == 404


def test_a_route_may_be_written_with_escapes(server: RunningServer) -> None:
    response = server.http.get("/c%6Fding/v1/models/toy%40keeper")
    assert response.json()["id"] == "toy@keeper"


def test_the_models_that_are_listed_include_each_cache(server: RunningServer) -> None:
    assert names(server) == ["toy", "gpt-4o", "plain", "broken", "toy@keeper", "toy@pilot"]
    server.create("fresh", KEEPER)
    assert "toy@fresh" in names(server)
    shown = server.http.get("/v1/models/toy@fresh").json()
    assert (shown["id"], shown["object"]) == ("toy@fresh", "model")
    server.http.delete("/v1/cache/toy/fresh")
    assert "toy@fresh" not in names(server)
    assert server.http.get("/v1/models/toy@fresh").json()["error"]["code"] == "cache_not_found"


def test_the_caches_of_a_model_are_under_its_name_alone(server: RunningServer) -> None:
    for response in (
        server.http.get("/v1/cache/toy@keeper"),
        server.http.delete("/v1/cache/toy@keeper/keeper"),
        server.post("/v1/cache/toy@keeper", cache_name="x", prompt="x"),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
    assert server.http.get("/v1/cache/gpt-4o").json() == server.http.get("/v1/cache/toy").json()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[routes]\n"coding" = "x"', "not a route"),
        ('[routes]\n"/coding/" = "x"', "not a route"),
        ('[routes]\n"/" = "x"', "not a route"),
        ('[routes]\n"/v1" = "x"', "not a route"),
        ('[routes]\n"/v1/cache" = "x"', "not a route"),
        ('[routes]\n"/coding" = "a b"', "not a name"),
        ('[aliases]\na = "smollm2@"', "not a name"),
        ('[aliases]\na = "none@keeper"', "not a model"),
    ],
)
def test_a_wrong_route_or_alias_is_refused_at_the_start(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "headstart.toml").write_text(text)
    done = headstart("serve", "--config", str(tmp_path / "headstart.toml"))
    assert done.returncode == 1
    assert told in done.stderr
