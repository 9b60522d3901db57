"""Turns stay small when a model is unloaded, and when processes end or are killed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from chats import LONG, SYSTEM, Chat, Kind, right
from conftest import Serve
from headstart.engine.states.block_file import DamagedBlock, read_header
from headstart.service.models.state_limits import states_directory
from headstart.tokens import common_prefix
from servers import RunningServer, events, eventually

pytestmark = pytest.mark.slow

OTHER = ("--model", "other=toy:weights=other")


def stored(server: RunningServer) -> list[Path]:
    return list(states_directory(server.cache_dir).rglob("*.block"))


def on_disk(server: RunningServer, tokens: list[int]) -> int:
    """The number of tokens with which a chain of blocks on the disk begins as these do."""
    ends = {"": 0}
    while True:
        before = len(ends)
        for path in stored(server):
            try:
                header = read_header(path).header
            except (OSError, DamagedBlock):
                continue
            if ends.get(header.parent) == header.start:
                shared = common_prefix(list(header.tokens), tokens[header.start :])
                if shared == len(header.tokens):
                    ends[header.address] = header.end
        if len(ends) == before:
            return max(ends.values())


def settled(server: RunningServer, chat: Chat) -> None:
    """Returns when all that was computed for the chat is on the disk, but for the last token, which was not
    evaluated, and for a beginning of the answer whose tokens are not those of its text."""
    eventually(lambda: on_disk(server, chat.known) >= len(chat.known) - 1)


def unload(server: RunningServer) -> None:
    eventually(lambda: server.post("/v1/models/unload", model="toy").status_code == 200)


def swap(server: RunningServer) -> None:
    server.chat("Hello?", model="other")
    server.chat("Hello?", model="other")
    assert [model["id"] for model in server.http.get("/v1/models/loaded").json()["data"]] == ["other"]


def leave_alone(server: RunningServer) -> None:
    eventually(lambda: server.http.get("/v1/models/loaded").json()["data"] == [])


@pytest.mark.parametrize(
    ("end", "env"),
    [
        (unload, {}),
        (leave_alone, {"HEADSTART_IDLE_UNLOAD_SECONDS": "0.3"}),
        (swap, {"HEADSTART_MAX_LOADED": "1"}),
        (RunningServer.restart, {}),
    ],
)
def test_the_turn_after_the_model_was_unloaded(
    serve: Serve, kind: Kind, end: Callable[[RunningServer], None], env: dict[str, str]
) -> None:
    server = serve(*OTHER, env=env)
    chat = Chat(server, SYSTEM, back=kind[1])
    chat.ask(LONG)
    for number in range(2):
        end(server)
        turn = chat.ask(f"And number {number}?")
        assert turn.source == "disk"
        right(chat, turn)
    end(server)
    right(chat, chat.again())
    end(server)
    right(chat, chat.edited("Or else?"))


def kill_server(server: RunningServer) -> None:
    """All its processes at once."""
    workers = server.workers()
    for process in workers:
        process.suspend()
    server.process.send_signal(signal.SIGKILL)
    for process in workers:
        process.kill()
    server.process.wait(30)
    server.http.close()
    server.start()


def kill_worker(server: RunningServer) -> None:
    (worker,) = server.workers()
    worker.kill()
    worker.wait(30)
    eventually(lambda: server.post("/tokenize", model="toy", content="x").status_code == 200)
    eventually(lambda: bool(server.workers()) and server.http.get("/ready").status_code == 200)


KILLS = pytest.mark.parametrize("kill", [kill_server, kill_worker])


@KILLS
def test_the_turn_after_an_idle_server_was_killed(
    serve: Serve, kind: Kind, kill: Callable[[RunningServer], None]
) -> None:
    server = serve()
    chat = Chat(server, SYSTEM, back=kind[1])
    chat.ask(LONG)
    for number in range(2):
        settled(server, chat)
        kill(server)
        right(chat, chat.ask(f"And number {number}?"))


@KILLS
def test_after_a_kill_of_a_busy_server_only_what_was_not_written_is_computed(
    serve: Serve, kind: Kind, kill: Callable[[RunningServer], None]
) -> None:
    server = serve()
    chat = Chat(server, SYSTEM, back=kind[1])
    chat.ask(LONG)
    settled(server, chat)
    chat.messages.append({"role": "user", "content": "And then?"})
    body = chat.body(stream=True, max_tokens=3000)
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert next(events(response))
        kill(server)
    right(chat, chat.answer())
