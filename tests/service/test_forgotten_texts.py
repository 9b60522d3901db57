"""When a cache is deleted, replaced or expired, no file and no later request has its text any more, unless
another cache of the same owner begins with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from headstart.engine.states.block_file import SUFFIX, read_header
from headstart.service.models.state_limits import states_directory
from servers import Json, RunningServer, eventually, running_server, said

SECRET = "The treasure lies below the seventh lantern. " * 8
COMMON = "You keep the lighthouse and answer in few words. " * 8
CONFIG = """
models = {toy = "toy:eos=0"}
[keys.root]
key = "root-key"
admin = true
[keys.ann]
key = "ann-key"
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with running_server(tmp_path / "cache", "--model", "toy=toy:eos=0") as server:
        yield server


def ids(server: RunningServer, text: str) -> list[int]:
    tokens: list[int] = server.post("/tokenize", model="toy", content=text).json()["tokens"]
    return tokens


def unload(server: RunningServer) -> None:
    """All that its worker may keep is in files then."""
    eventually(lambda: server.post("/v1/models/unload", model="toy").status_code == 200)


def blocks(server: RunningServer, owner: str = "") -> list[list[int]]:
    """The tokens of each block in the directory."""
    found = [read_header(path) for path in states_directory(server.cache_dir).rglob(f"*{SUFFIX}")]
    return [list(block.header.tokens) for block in found if block.header.owner == owner]


def holds(found: Sequence[list[int]], part: list[int]) -> bool:
    """Whether a block has these tokens."""
    starts = ((tokens, at) for tokens in found for at in range(len(tokens)) if tokens[at] == part[0])
    return any(tokens[at : at + len(part)] == part for tokens, at in starts)


def part_of(server: RunningServer, text: str) -> list[int]:
    return ids(server, text)[60:80]


def test_a_deleted_text_is_in_no_file_and_what_others_said_still_is(server: RunningServer) -> None:
    secret, common = part_of(server, SECRET), part_of(server, COMMON)
    server.create("secret", SECRET)
    server.chat("Where?", use_cache="secret")
    server.chat("Where is it?", system=SECRET)
    server.chat("Who?", system=COMMON)
    unload(server)
    assert holds(blocks(server), secret)
    server.chat("Who are you?", system=COMMON)
    server.http.delete("/v1/cache/toy/secret").raise_for_status()
    unload(server)
    assert not holds(blocks(server), secret)
    assert holds(blocks(server), common)
    text = SECRET[:40].encode()
    assert not any(text in path.read_bytes() for path in server.cache_dir.rglob("*") if path.is_file())
    again = server.chat("Where is it?", system=SECRET)["timings"]
    assert again["cache_n"] < 60


def test_the_text_of_a_model_that_is_not_loaded_is_deleted_too(server: RunningServer) -> None:
    secret = part_of(server, SECRET)
    server.create("secret", SECRET)
    server.chat("Where?", use_cache="secret")
    unload(server)
    assert holds(blocks(server), secret)
    server.http.delete("/v1/cache/toy/secret").raise_for_status()
    assert not holds(blocks(server), secret)
    assert not server.workers()


def test_what_another_cache_of_the_owner_begins_with_stays(server: RunningServer) -> None:
    secret, common = part_of(server, SECRET), part_of(server, COMMON)
    server.create("common", COMMON)
    server.chat("Who?", use_cache="common", save_as="talk")
    server.chat(SECRET, use_cache="talk", save_as="more")
    unload(server)
    for name, kept in (("common", True), ("talk", True), ("more", False)):
        assert holds(blocks(server), common)
        assert holds(blocks(server), secret)
        server.http.delete(f"/v1/cache/toy/{name}").raise_for_status()
        assert holds(blocks(server), common) is kept
    assert not holds(blocks(server), secret)


def test_a_replaced_text_is_gone_and_the_same_text_stays(server: RunningServer) -> None:
    secret = part_of(server, SECRET)
    server.create("secret", SECRET)
    server.chat("Where?", use_cache="secret")
    server.create("secret", SECRET)
    unload(server)
    assert holds(blocks(server), secret)
    server.create("secret", COMMON)
    unload(server)
    assert not holds(blocks(server), secret)
    assert server.chat("Who?", use_cache="secret")["usage"]["cache_hit"] is True


def test_an_expired_text_is_gone(server: RunningServer) -> None:
    secret = part_of(server, SECRET)
    server.create("secret", SECRET)
    server.chat("Where?", use_cache="secret")
    unload(server)
    assert holds(blocks(server), secret)
    server.http.patch("/v1/cache/toy/secret", json={"ttl_seconds": 0.01}).raise_for_status()
    eventually(lambda: not holds(blocks(server), secret), 30)


def test_a_deleted_response_is_gone(server: RunningServer) -> None:
    secret = part_of(server, SECRET)
    body = {"model": "toy", "input": SECRET, "max_output_tokens": 8}
    name = server.post("/v1/responses", **body).json()["id"]
    unload(server)
    assert holds(blocks(server), secret)
    server.http.delete(f"/v1/responses/{name}").raise_for_status()
    unload(server)
    assert not holds(blocks(server), secret)


def test_evicting_a_cache_leaves_its_text_in_the_store(tmp_path: Path) -> None:
    env = {"HEADSTART_AUTOMATIC_AFTER": "1", "HEADSTART_AUTOMATIC_QUOTA_MB": "0.0001"}
    with running_server(tmp_path / "cache", "--model", "toy=toy:eos=0", env=env) as server:
        secret = part_of(server, SECRET)
        for question in ("Where?", "When?", "Who?"):
            server.chat(question, system=SECRET)
        unload(server)
        assert server.http.get("/v1/cache").json()["data"] == []
        assert holds(blocks(server), secret)


def test_an_evicted_cache_whose_model_is_not_loaded_takes_all_of_its_owner_with_it(tmp_path: Path) -> None:
    """Nobody knows then which tokens its text was."""
    with running_server(tmp_path / "cache", "--model", "toy=toy:eos=0") as server:
        secret = part_of(server, SECRET)
        server.create("secret", SECRET)
        server.chat("Where?", use_cache="secret")
        server.flags = (*server.flags, "--quota-mb", "0.0001")
        server.env["HEADSTART_PRELOAD"] = "none"
        server.restart()
        eventually(lambda: bool(server.http.get("/v1/cache/toy/secret").json()["evicted"]))
        assert holds(blocks(server), secret)
        server.http.delete("/v1/cache/toy/secret").raise_for_status()
        assert not holds(blocks(server), secret)


def call(server: RunningServer, key: str, method: str, path: str, **more: Any) -> httpx.Response:
    answer = server.http.request(method, path, headers={"authorization": f"Bearer {key}-key"}, **more)
    assert answer.status_code == 200, answer.text
    return answer


def chat(text: str) -> Json:
    messages = [{"role": "system", "content": SECRET}, {"role": "user", "content": text}]
    return {"model": "toy", "messages": messages, "max_tokens": 8, "temperature": 0}


def test_each_key_has_its_own_and_deletes_no_others(tmp_path: Path) -> None:
    (tmp_path / "headstart.toml").write_text(CONFIG)
    with running_server(tmp_path / "cache", "--config", str(tmp_path / "headstart.toml")) as server:
        tokens = call(server, "ann", "POST", "/tokenize", json={"model": "toy", "content": SECRET}).json()
        secret = tokens["tokens"][60:80]
        answers = [
            call(server, key, "POST", "/v1/chat/completions", json=chat("Where?")).json()
            for key in ("ann", "root")
        ]
        assert [answer["timings"]["cache_n"] for answer in answers] == [0, 0]
        assert said(answers[0]) == said(answers[1])
        call(server, "ann", "POST", "/v1/cache/toy", json={"cache_name": "secret", "prompt": SECRET})
        call(server, "ann", "DELETE", "/v1/cache/toy/secret")
        eventually(
            lambda: (
                server.http.post(
                    "/v1/models/unload",
                    json={"model": "toy"},
                    headers={"authorization": "Bearer root-key"},
                ).status_code
                == 200
            )
        )
        assert not holds(blocks(server, "ann"), secret)
        assert holds(blocks(server, "root"), secret)
