"""A turn evaluates what is new in it and at most one chunk, whoever asked meanwhile, on the default settings,
and says what it would say if nothing was reused.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from chats import LONG, SYSTEM, Chat, Kind, Turn, right
from conftest import Serve
from servers import RunningServer, events, eventually

pytestmark = pytest.mark.slow

PILOT = "You bring ships into the harbour. " * 30


@pytest.mark.parametrize("slots", ["1", "4"])
@pytest.mark.parametrize("opening", ["same", "another", "none", "named"])
def test_two_chats_in_turn(serve: Serve, kind: Kind, slots: str, opening: str) -> None:
    server = serve("--slots", slots)
    one = Chat(server, SYSTEM, back=kind[1])
    other = Chat(server, back=kind[1])
    if opening == "named":
        server.create("keeper", SYSTEM)
        for chat in (one, other):
            chat.system, chat.more = "", {"use_cache": "keeper"}
    else:
        other.system = {"same": SYSTEM, "another": PILOT, "none": ""}[opening]
    for number in range(4):
        for chat in (one, other):
            turn = chat.ask(f"What about {'this' if chat is one else 'that'}, number {number}?")
            if number or opening == "named":
                assert turn.is_small, (number, chat is one, turn)
    for chat in (one, other):
        right(chat, chat.again())


def _title(server: RunningServer) -> None:
    server.chat(f"Give the conversation a title: {LONG}", system="You write titles.")


def _embedding(server: RunningServer) -> None:
    server.post("/v1/embeddings", model="toy", input=[LONG, SYSTEM]).raise_for_status()


def _build(server: RunningServer) -> None:
    for number in range(4):
        server.create(f"cache-{number}", f"Number {number}. {PILOT}")


@pytest.mark.parametrize("slots", ["1", "4"])
@pytest.mark.parametrize("meanwhile", [_title, _embedding, _build])
def test_others_between_two_turns(
    serve: Serve, kind: Kind, slots: str, meanwhile: Callable[[RunningServer], None]
) -> None:
    server = serve("--slots", slots)
    chat = Chat(server, SYSTEM, back=kind[1])
    chat.ask(LONG)
    for number in range(3):
        meanwhile(server)
        right(chat, chat.ask(f"And number {number}?"))


@pytest.mark.parametrize("waits", [True, False])
def test_every_turn_whatever_becomes_automatic_meanwhile(serve: Serve, kind: Kind, waits: bool) -> None:
    server = serve()
    chat = Chat(server, SYSTEM, back=kind[1])
    chat.ask(LONG)
    for number in range(8):
        if waits:
            eventually(lambda: server.http.get("/v1/cache").json()["building"] == [])
        turn = chat.ask(f"And number {number}?")
        assert turn.is_small, turn
    right(chat, chat.again())


@pytest.mark.parametrize("n", [4, 5, 12])
@pytest.mark.parametrize("shares", [True, False])
def test_agents_at_once_on_one_cache(serve: Serve, kind: Kind, n: int, shares: bool) -> None:
    server = serve(env={} if shares else {"HEADSTART_SHARE_FROM": "0"})
    server.create("keeper", SYSTEM)
    more = {"use_cache": "keeper", "max_tokens": 30}
    agents = [Chat(server, back=kind[1], more=more) for _ in range(n)]
    together = Barrier(n)

    def ask(agent: int, number: int) -> Turn:
        together.wait()
        return agents[agent].ask(f"Agent {agent} asks for number {number}. " * 6)

    with ThreadPoolExecutor(n) as pool:
        for number in range(4):
            turns = list(pool.map(ask, range(n), [number] * n))
            assert number == 0 or all(turn.is_small for turn in turns), (number, turns)
            for agent, turn in zip(agents, turns, strict=True):
                assert turn.text == agent.alone()


@pytest.mark.parametrize("slots", ["1", "4"])
def test_another_answer_another_question_and_less_of_an_answer(serve: Serve, kind: Kind, slots: str) -> None:
    server = serve("--slots", slots)
    # A prompt of several checkpoints.
    chat = Chat(server, SYSTEM, back=kind[1])
    chat.ask(LONG)
    chat.ask("Which?")
    right(chat, chat.again())
    right(chat, chat.edited("Which one?"))
    right(chat, chat.again(max_tokens=20))
    # Trimmed by the client.
    chat.messages[-1]["content"] = str(chat.messages[-1]["content"])[:9]
    chat.ends_known = False
    right(chat, chat.ask("Why?"))
    _title(server)
    right(chat, chat.again())
    right(chat, chat.edited("Why not?"))


def test_the_turn_after_a_stopped_answer(serve: Serve, kind: Kind) -> None:
    server = serve()
    chat = Chat(server, SYSTEM, back=kind[1])
    chat.ask(LONG)
    right(chat, chat.ask("Which?", stop=["e", "a", "o"], max_tokens=200))
    chat.messages.append({"role": "user", "content": "Why?"})
    body = chat.body(stream=True, max_tokens=500)
    text = ""
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        for event in events(response):
            text += event["choices"][0]["delta"].get("content", "") if event["choices"] else ""
            if len(text) > 30:
                break
    chat.said(text)
    right(chat, chat.ask("Why not?"))
