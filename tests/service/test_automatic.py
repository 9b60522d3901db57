"""System prompts that come often become caches by themselves, and answers stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import StartServer
from forkserver import headstart
from headstart.names import Namespace
from headstart.service.origins import automatic as seen
from headstart.service.origins.automatic import RecentUse
from servers import Json, RunningServer, eventually, said

KEEPER = "You keep the lighthouse. " * 20
PILOT = "You bring ships into the harbour. " * 20
TOY = ("--model", "toy=toy:")


def started(start_server: StartServer, tmp_path: Path, text: str, model: str = "toy:") -> RunningServer:
    config = tmp_path / "headstart.toml"
    config.write_text(f'{text}\n[models]\ntoy = "{model}"\n')
    return start_server("--config", str(config))


def caches(server: RunningServer) -> list[Json]:
    listed = server.http.get("/v1/cache").json()
    assert isinstance(listed["data"], list)
    return listed["data"]


def made(server: RunningServer, n: int = 1) -> list[str]:
    """The names of the automatic caches, once there are `n`."""
    eventually(lambda: len(caches(server)) >= n and not server.http.get("/v1/cache").json()["building"])
    return [entry["cache_name"] for entry in caches(server) if entry["origin"] == "automatic"]


def quiet(server: RunningServer) -> None:
    """Whatever an answer's end may have set going is done, as another request's end shows."""
    server.chat("Nothing.", max_tokens=1)
    eventually(lambda: server.http.get("/v1/cache").json()["building"] == [])


def test_a_system_prompt_that_came_three_times_is_a_cache(start_server: StartServer) -> None:
    server = start_server(*TOY)
    for text in ("One?", "Two?"):
        server.chat(text, system=KEEPER)
    quiet(server)
    assert caches(server) == []
    server.chat("Three?", system=KEEPER)
    (name,) = made(server)
    assert name.startswith("auto-")
    assert len(name) == len("auto-") + 12
    shown = server.http.get(f"/v1/cache/toy/{name}").json()
    assert (shown["prompt"], shown["origin"], list(shown["forms"])) == (KEEPER, "automatic", ["chat"])


def test_after_a_restart_requests_start_from_its_state_with_the_same_answer(
    start_server: StartServer,
) -> None:
    server = start_server(*TOY)
    for _ in range(3):
        server.chat("One?", system=KEEPER)
    made(server)
    cold = server.chat("What do you see?", system=KEEPER, cache_prompt=False)
    server.restart()
    warm = server.chat("What do you see?", system=KEEPER)
    assert said(warm) == said(cold)
    assert warm["timings"]["cache_source"] == "file"
    assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] > 400
    assert not {"cache_hit", "cached_prompts"} & warm["usage"].keys()
    eventually(lambda: caches(server)[0]["hits"] == 1)
    assert caches(server)[0]["tokens_saved"] == warm["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_streamed_requests_count_and_use_it_too(start_server: StartServer) -> None:
    server = start_server(*TOY)
    body = {"model": "toy", "stream": True, "max_tokens": 5, "temperature": 0}
    body["messages"] = [{"role": "system", "content": KEEPER}, {"role": "user", "content": "One?"}]
    for _ in range(3):
        assert "[DONE]" in server.http.post("/v1/chat/completions", json=body).text
    made(server)
    server.restart()
    assert '"cache_source":"file"' in server.http.post("/v1/chat/completions", json=body).text


def test_several_system_messages_are_kept_as_one_opening(start_server: StartServer) -> None:
    server = start_server(*TOY)
    messages = [{"role": "system", "content": text} for text in (KEEPER, PILOT)]
    body = {"model": "toy", "temperature": 0, "messages": [*messages, {"role": "user", "content": "Who?"}]}
    answers = [server.post("/v1/chat/completions", **body).json() for _ in range(3)]
    made(server)
    server.restart()
    warm = server.post("/v1/chat/completions", **body).json()
    assert warm["timings"]["cache_source"] == "file"
    assert {said(answer) for answer in [*answers, warm]} == {said(warm)}


def test_any_cache_with_the_same_opening_is_used_and_none_is_made(start_server: StartServer) -> None:
    server = start_server(*TOY)
    server.create("keeper", KEEPER)
    server.restart()
    answers = [server.chat("Who?", system=KEEPER) for _ in range(4)]
    assert answers[0]["timings"]["cache_source"] == "file"
    quiet(server)
    assert [entry["cache_name"] for entry in caches(server)] == ["keeper"]
    assert said(answers[0]) == said(server.chat("Who?", use_cache="keeper"))


def test_a_model_whose_states_can_not_be_cut_keeps_its_text(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:can_cut=0")
    cold = said(server.chat("Who?", system=KEEPER, cache_prompt=False))
    for _ in range(3):
        server.chat("One?", system=KEEPER)
    made(server)
    server.restart()
    warm = server.chat("Who?", system=KEEPER)
    assert (warm["timings"]["cache_source"], said(warm)) == ("file", cold)


@pytest.mark.parametrize(
    ("why", "text", "system", "more"),
    [
        ("it is short", "", "You keep the lighthouse.", {}),
        ("as many tokens are asked for", "automatic_tokens = 2000", KEEPER, {}),
        ("it is turned off", "automatic = false", KEEPER, {}),
        ("more are asked for", "automatic_after = 4", KEEPER, {}),
        ("they came too long ago", "automatic_window = 0.000001", KEEPER, {}),
        ("they would have nothing kept", "", KEEPER, {"cache_prompt": False}),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_three_requests_make_none_if(
    start_server: StartServer, tmp_path: Path, why: str, text: str, system: str, more: Json
) -> None:
    server = started(start_server, tmp_path, text)
    for _ in range(3):
        server.chat("One?", system=system, max_tokens=1, **more)
    quiet(server)
    assert caches(server) == [], why


def test_the_ones_not_used_for_longest_go_when_all_are_too_large(
    start_server: StartServer, tmp_path: Path
) -> None:
    # A toy's state takes 4 bytes a token: each of these caches about 5 kB.
    server = started(start_server, tmp_path, "automatic_after = 1\nautomatic_quota_mb = 0.013")
    first, second, third = (f"You are number {i}. " + KEEPER for i in range(3))
    server.chat("One?", system=first)
    (kept,) = made(server)
    server.chat("One?", system=second)
    (gone,) = set(made(server, 2)) - {kept}
    server.chat("One?", system=first)
    server.chat("One?", system=third)
    eventually(lambda: gone not in made(server))
    names = made(server, 2)
    assert kept in names
    assert len(names) == 2


def test_one_larger_than_the_quota_is_not_made_again_and_again(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = started(
        start_server, tmp_path, 'automatic_after = 1\nautomatic_quota_mb = 0.001\nlog_level = "info"'
    )
    server.create("mine", PILOT)
    for _ in range(3):
        server.chat("One?", system=KEEPER)
        quiet(server)
    assert [entry["cache_name"] for entry in caches(server)] == ["mine"]
    assert server.log.read_text().count("exceeds automatic_quota_mb") == 1


def test_one_that_no_longer_fits_is_built_again(start_server: StartServer, tmp_path: Path) -> None:
    server = started(start_server, tmp_path, "automatic_after = 1")
    server.chat("One?", system=KEEPER)
    made(server)
    server.stop()
    server = started(start_server, tmp_path, "automatic_after = 1", model="toy:weights=others")
    cold = server.chat("Two?", system=KEEPER)
    assert cold["timings"]["cache_source"] == "none"
    made(server)
    server.restart()
    warm = server.chat("Two?", system=KEEPER)
    assert warm["timings"]["cache_source"] == "file"
    assert said(warm) == said(cold)


def test_a_damaged_one_is_not_used_and_built_again(start_server: StartServer, tmp_path: Path) -> None:
    server = started(start_server, tmp_path, "automatic_after = 1\nstate_memory_mb = 0\nstate_disk_mb = 0")
    right = said(server.chat("One?", system=KEEPER))
    made(server)
    server.stop()
    (path,) = server.cache_dir.glob("toy/auto-*")
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    server.start()
    answer = server.chat("One?", system=KEEPER)
    assert (answer["timings"]["cache_source"], said(answer)) == ("none", right)
    made(server)
    server.restart()
    assert server.chat("One?", system=KEEPER)["timings"]["cache_source"] == "file"


def test_it_can_be_named_shown_and_deleted_like_others(start_server: StartServer, tmp_path: Path) -> None:
    server = started(start_server, tmp_path, "automatic_after = 1")
    server.chat("One?", system=KEEPER)
    (name,) = made(server)
    assert server.chat("One?", use_cache=name)["usage"]["cached_prompts"] == [name]
    assert server.http.delete(f"/v1/cache/toy/{name}").status_code == 200
    assert caches(server) == []


def test_a_default_system_message_is_taken_where_there_is_none(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = started(start_server, tmp_path, f'default_system = "{KEEPER}"')
    as_sent = said(server.chat("Who?", system=KEEPER, cache_prompt=False))
    assert said(server.chat("Who?")) == as_sent
    other = said(server.chat("Who?", system=PILOT))
    assert other != as_sent
    server.create("pilot", PILOT)
    assert said(server.chat("Who?", use_cache="pilot")) == other


def test_a_default_system_message_is_kept_from_the_first_request_on(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = started(start_server, tmp_path, 'default_system = "You are brief."')
    cold = server.chat("Who?")
    made(server)
    server.restart()
    warm = server.chat("Who?")
    assert warm["timings"]["cache_source"] == "file"
    assert said(warm) == said(cold)


def test_an_empty_default_system_message_is_refused_at_the_start(tmp_path: Path) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text('default_system = ""\n')
    done = headstart("serve", "--config", str(config))
    assert done.returncode == 1
    assert "default_system" in done.stderr


def test_what_was_seen_is_counted_within_the_window_and_by_shelf() -> None:
    memory = RecentUse(window=10)
    one, two = Namespace("one"), Namespace("two")
    assert [memory.again(one, "a", now, 3) for now in (0, 1, 12, 13, 14)] == [False] * 4 + [True]
    assert [memory.again(one, "a", 15, 3), memory.again(two, "a", 15, 1)] == [False, True]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "MOST", 2)
    memory = RecentUse(window=10)
    for what in ("a", "b", "c"):
        assert not memory.again(Namespace("one"), what, 0, 2)
    assert not memory.again(Namespace("one"), "a", 1, 2)
    assert memory.again(Namespace("one"), "c", 1, 2)


@pytest.mark.real_model
def test_a_real_model_says_the_same_from_an_automatic_cache(start_server: StartServer) -> None:
    server = start_server("--ctx", "1024", "--slots", "2")
    ask: dict[str, Any] = {"model": "smollm2", "system": KEEPER, "max_tokens": 16}
    for _ in range(3):
        server.chat("One?", **{**ask, "max_tokens": 1})
    made(server)
    cold = server.chat("What do you keep?", **ask, cache_prompt=False)
    server.restart()
    warm = server.chat("What do you keep?", **ask)
    assert warm["timings"]["cache_source"] == "file"
    assert said(warm) == said(cold)
