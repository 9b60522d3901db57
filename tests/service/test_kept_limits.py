"""The state store stays within its limits, serves nobody else, and never changes a text: not on a full disk,
and not where it is damaged."""

from __future__ import annotations

from array import array
from pathlib import Path
from threading import Event, Thread

import pytest

from chats import LONG, SYSTEM, Chat, Kind, right
from conftest import Serve, StartServer
from headstart.service.models.state_limits import states_directory
from mounts import mounted
from servers import Json, RunningServer, events, eventually

pytestmark = pytest.mark.slow


def unload(server: RunningServer) -> None:
    eventually(lambda: server.post("/v1/models/unload", model="toy").status_code == 200)


def test_the_limits_hold_at_every_moment(start_server: StartServer, kind: Kind) -> None:
    limits = {"HEADSTART_STATE_MEMORY_MB": "0.03", "HEADSTART_STATE_DISK_MB": "0.1"}
    server = start_server("--model", f"toy={kind[0]}", env=limits)
    over: list[int] = []
    done = Event()
    largest = 0

    def watch() -> None:
        nonlocal largest
        while not done.is_set():
            sizes = []
            for path in states_directory(server.cache_dir).rglob("*"):
                try:
                    sizes.append(path.stat().st_size if path.is_file() else 0)
                except FileNotFoundError:
                    continue
            largest = max(largest, sum(sizes))
            if sum(sizes) > 100_000:
                over.append(sum(sizes))

    watching = Thread(target=watch)
    watching.start()
    try:
        chats = [Chat(server, f"Number {number}. {SYSTEM}", back=kind[1]) for number in range(8)]
        for _ in range(3):
            for chat in chats:
                turn = chat.ask(LONG[:300])
                assert turn.text == chat.alone()
                store = server.http.get("/v1/cache").json()["store"]
                assert store["memory"]["bytes"] <= store["memory"]["limit_bytes"] == 30_000
                assert store["disk"]["bytes"] <= store["disk"]["limit_bytes"] == 100_000
    finally:
        done.set()
        watching.join()
    assert not over
    assert largest > 50_000
    assert store["evictions"]


def _states_on_a_disk_of_its_own(serve: Serve, tmp_path: Path) -> Path:
    place = states_directory(tmp_path / "cache")
    place.mkdir(parents=True)
    return place


def test_a_full_disk_costs_nothing_but_time(serve: Serve, kind: Kind, tmp_path: Path) -> None:
    place = _states_on_a_disk_of_its_own(serve, tmp_path)
    with mounted("-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)):
        server = serve(env={"HEADSTART_STATE_DISK_MB": "50"})
        ballast = place / "ballast"
        ballast.write_bytes(b"x" * 170_000)
        chats = [Chat(server, f"{number}. {SYSTEM}", back=kind[1]) for number in range(8)]
        for number in range(2):
            for chat in chats:
                turn = chat.ask(LONG[:200])
                assert turn.text == chat.alone()
                assert number == 0 or turn.is_small
        server.restart()
        for chat in chats:
            assert chat.again().text == chat.alone()
        server.stop()


def test_a_disk_that_can_not_be_written_costs_nothing_but_time(
    serve: Serve, kind: Kind, tmp_path: Path
) -> None:
    place = _states_on_a_disk_of_its_own(serve, tmp_path)
    server = serve()
    chat = Chat(server, SYSTEM, back=kind[1])
    chat.ask(LONG)
    server.stop()
    with mounted("--bind", "-o", "ro", str(place), str(place)):
        server.start()
        for number in range(3):
            turn = chat.ask(f"And number {number}?")
            assert turn.text == chat.alone()
            assert number == 0 or turn.is_small
        server.stop()


def test_a_damaged_block_costs_nothing_but_time(serve: Serve, kind: Kind) -> None:
    server = serve()
    chat = Chat(server, SYSTEM, back=kind[1])
    chat.ask(LONG)
    for number in range(4):
        server.stop()
        for at, path in enumerate(states_directory(server.cache_dir).rglob("*.block")):
            content = bytearray(path.read_bytes())
            content[(number * len(content) // 4 + at) % len(content)] ^= 1 << number
            path.write_bytes(content)
        server.start()
        turn = chat.ask(f"And number {number}?")
        assert turn.text == chat.alone()
        assert not turn.cached
        right(chat, chat.ask("And then?"))


CONFIG = """
models = {toy = "%s"}
[keys.ann]
key = "ann-key"
[keys.bob]
key = "bob-key"
"""


def test_nothing_of_one_key_is_used_for_another(
    start_server: StartServer, kind: Kind, tmp_path: Path
) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text(CONFIG % kind[0])
    server = start_server("--config", str(config), "--slots", "1")

    # From the slot, from memory, from the disk.
    for number in range(3):
        ann, bob = (Chat(server, SYSTEM, key=f"{name}-key", back=kind[1]) for name in ("ann", "bob"))
        question = f"{number}. {LONG}"
        ann.ask(question)
        if number == 1:
            Chat(server, key="ann-key").ask("Something else?")
        if number == 2:
            server.restart()
        turn = bob.ask(question)
        # Of his own he has the system prompt from the second time on.
        assert turn.cached == 0 if number == 0 else turn.cached <= len(SYSTEM)
        assert turn.text == ann.messages[-1]["content"]
        right(ann, ann.ask("And then?"))
        right(bob, bob.ask("And then?"))


def test_a_deleted_text_is_nowhere_also_where_a_chat_of_it_is_running(serve: Serve, kind: Kind) -> None:
    server = serve()
    secret = "The treasure lies below the seventh lantern. " * 40
    server.create("keeper", secret)
    chat = Chat(server, more={"use_cache": "keeper"}, back=kind[1])
    chat.ask("Where?")
    body: Json = chat.body(stream=True, max_tokens=1500)
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        stream = events(response)
        next(stream)
        server.http.delete("/v1/cache/toy/keeper").raise_for_status()
        for _ in stream:
            pass
    server.chat("Something else?")
    tokens = chat._tokens(secret)
    unload(server)
    for path in server.cache_dir.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"below the seventh lantern" not in content, path
            assert array("i", tokens[60:80]).tobytes() not in content, path
    assert Chat(server, secret).ask("Where?").cached < 10
