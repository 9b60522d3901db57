"""Turns stay small with models that compute: one of each kind of memory, and SmolLM2."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

import tiny_models
from chats import STEP, Chat, Turn
from conftest import StartServer
from headstart.model_files import embedded_model
from servers import ONE_THREAD, RunningServer, eventually, running_server

pytestmark = [pytest.mark.real_model, pytest.mark.slow, pytest.mark.timeout(600)]

RULES = "You keep the harbour and the old lighthouse, and you answer visitors from these rules. "
LONG = "Tell me which of the ships that came in before noon is the one I asked you for yesterday. " * 4
QUESTIONS = [LONG, *(f"And what about the ship with number {number}?" for number in range(1, 7))]
KINDS = {"smollm2": 0, "full": 0, "window": STEP, "hybrid": STEP, "recurrent": STEP}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def flags(kind: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The model, under the name "it", and a toy."""
    path = embedded_model()
    if kind != "smollm2":
        path = str(tiny_models.written(tmp_path_factory.mktemp("model") / "tiny.gguf", kind))
    return ("--model", f"it={path}", "--model", "toy=toy:")


def system_of(kind: str) -> str:
    """A tiny model's is longer than from one checkpoint to the next: going back isn't starting over."""
    return RULES * (10 if kind == "smollm2" else 70)


def chat_with(server: RunningServer, kind: str, system: str | None = None) -> Chat:
    return Chat(
        server,
        system_of(kind) if system is None else system,
        model="it",
        back=KINDS[kind],
        more={"max_tokens": 8},
    )


@pytest.fixture(scope="module")
def expected(kind: str, flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The answers of a conversation that stays in its slot."""
    directory = tmp_path_factory.mktemp("expected") / "cache"
    off = {"HEADSTART_STATE_MEMORY_MB": "0", "HEADSTART_STATE_DISK_MB": "0", "HEADSTART_AUTOMATIC": "false"}
    with running_server(directory, *ONE_THREAD, *flags, env=off) as server:
        chat = chat_with(server, kind)
        return [chat.ask(question).text for question in QUESTIONS]


def others(server: RunningServer) -> None:
    """Takes all slots."""
    for number in range(4):
        server.chat(f"{number}. {LONG}", model="it", system=f"{number}. You write titles.", max_tokens=2)


def named(server: RunningServer) -> None:
    server.post("/v1/embeddings", model="it", input=LONG).raise_for_status()
    for number in range(4):
        server.create(f"cache-{number}", f"{number}. {LONG}", model="it")


def unload(server: RunningServer) -> None:
    eventually(lambda: server.post("/v1/models/unload", model="it").status_code == 200)


def kill(server: RunningServer) -> None:
    """As soon as nothing more is being written."""
    sizes: list[int] = []

    def is_quiet() -> bool:
        store = server.http.get("/v1/cache/it").json()["store"]
        sizes.append(store["disk"]["bytes"])
        return len(sizes) > 300 and len(set(sizes[-200:])) == 1

    eventually(is_quiet, 60)
    for process in server.workers():
        process.kill()
    server.stop(signal.SIGKILL)
    server.start()


MEANWHILE: list[Callable[[RunningServer], None]] = [others, named, unload, RunningServer.restart, kill]


def test_turns_are_small_and_say_what_they_would_in_their_slot(
    start_server: StartServer, kind: str, flags: tuple[str, ...], expected: list[str]
) -> None:
    server = start_server(*flags)
    chat = chat_with(server, kind)
    assert chat.ask(QUESTIONS[0]).text == expected[0]
    for number, (question, happens) in enumerate(zip(QUESTIONS[1:], MEANWHILE, strict=False), 1):
        happens(server)
        turn = chat.ask(question)
        assert turn.is_small, (happens, turn)
        assert turn.source == ("memory" if happens in (others, named) else "disk"), happens
        assert turn.text == expected[number], (happens, turn)


def test_another_answer_another_question_and_less_of_an_answer(
    start_server: StartServer, kind: str, flags: tuple[str, ...], expected: list[str]
) -> None:
    server = start_server(*flags)
    chat = chat_with(server, kind)
    for question in QUESTIONS[:2]:
        chat.ask(question)
    for happens in (lambda _: None, others, unload):
        happens(server)
        turn = chat.again()
        assert turn.is_small, turn
        assert turn.text == expected[1]
        happens(server)
        turn = chat.edited("And what about the one without a number?")
        assert turn.is_small, turn
        happens(server)
        turn = chat.edited(QUESTIONS[1])
        assert turn.is_small, turn
        assert turn.text == expected[1]
    chat.messages[-1]["content"] = str(chat.messages[-1]["content"])[:9]
    chat.ends_known = False
    turn = chat.ask("Why?")
    assert turn.is_small, turn


@pytest.mark.parametrize("slots", ["1", "4"])
def test_two_chats_in_turn(
    start_server: StartServer, kind: str, flags: tuple[str, ...], expected: list[str], slots: str
) -> None:
    server = start_server(*flags, "--slots", slots)
    one, same, none = chat_with(server, kind), chat_with(server, kind), chat_with(server, kind, "")
    for number, question in enumerate(QUESTIONS[:4]):
        for chat in (one, same, none):
            turn = chat.ask(question if chat is one else f"{question} Or not?")
            assert number == 0 or turn.is_small, turn
            assert chat is not one or turn.text == expected[number]


def test_agents_at_once_on_one_cache(start_server: StartServer, kind: str, flags: tuple[str, ...]) -> None:
    server = start_server(*flags, env={"HEADSTART_SHARE_FROM": "0"})
    server.create("keeper", system_of(kind), model="it")
    more = {"use_cache": "keeper", "max_tokens": 8}
    n = 5
    agents = [Chat(server, model="it", back=KINDS[kind], more=more) for _ in range(n)]
    together = Barrier(n)

    def ask(agent: int, number: int) -> Turn:
        together.wait()
        return agents[agent].ask(f"Agent {agent} asks about the ship with number {number}.")

    said: list[list[str]] = []
    with ThreadPoolExecutor(n) as pool:
        for number in range(3):
            turns = list(pool.map(ask, range(n), [number] * n))
            assert number == 0 or all(turn.is_small for turn in turns), (number, turns)
            said.append([turn.text for turn in turns])
    server.http.delete("/v1/cache").raise_for_status()
    for agent in range(n):
        alone = Chat(server, model="it", back=KINDS[kind], more=more)
        for number in range(3):
            turn = alone.ask(f"Agent {agent} asks about the ship with number {number}.")
            assert turn.text == said[number][agent]
