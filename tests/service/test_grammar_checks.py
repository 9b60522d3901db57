"""Whatever grammars one client sends, others' are checked meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from conftest import StartServer
from headstart.errors import BadRequest, Overloaded
from headstart.service.generation import grammars as module
from headstart.service.generation.grammar_checker import CheckerProcess, TookTooLong
from headstart.service.generation.grammars import MOST_SECONDS, QUICK_SECONDS, GrammarChecks, lark_grammar
from servers import Json, RunningServer, eventually

HONEST = {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no"]}}}
KEYS = '[keys.ann]\nkey = "ann"\n[keys.bob]\nkey = "bob"\n'


def bomb(number: int) -> str:
    """Takes more time than a check may; each number's is another one."""
    return f"start: T{number}\nT{number}: " + " & ".join(f"/(a|b)*a(a|b){{{i}}}/" for i in range(10, 40))


def ask(server: RunningServer, key: str = "", **body: object) -> httpx.Response:
    messages = [{"role": "user", "content": "Hello"}]
    content = {"model": "toy", "messages": messages, "max_tokens": 50, **body}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{server.url}/v1/chat/completions", json=content, headers=headers, timeout=100)


class Attack:
    """Threads that each send something; `answers` are in the order in which they came."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, int | str]] = []
        self.threads: list[threading.Thread] = []

    def send(self, name: str, request: Callable[[], httpx.Response]) -> None:
        def run() -> None:
            try:
                answer: int | str = request().status_code
            except httpx.HTTPError as error:
                answer = type(error).__name__
            self.answers.append((name, answer))

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()


def checking(server: RunningServer) -> list[psutil.Process]:
    """The processes that compile grammars, and the forks in which they do."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "headstart.engine.grammar_check" in process.cmdline():
                found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("keys", ["", KEYS], ids=["without keys", "with keys"])
def test_thirty_bombs_do_not_hold_up_an_honest_schema(
    start_server: StartServer, tmp_path: Path, keys: str
) -> None:
    (tmp_path / "headstart.toml").write_text('models = {toy = "toy:"}\n' + keys)
    server = start_server("--config", str(tmp_path / "headstart.toml"))
    ann, bob = ("ann", "bob") if keys else ("", "")
    attack = Attack()
    for number in range(30):
        attack.send("bomb", lambda number=number: ask(server, ann, grammar=bomb(number)))  # type: ignore[misc]
    eventually(lambda: bool(checking(server)))
    attack.send("honest", lambda: ask(server, bob, response_format=HONEST))
    eventually(lambda: ("honest", 200) in attack.answers, seconds=90)
    assert len(attack.answers) < 16
    server.process.kill()
    for thread in attack.threads:
        thread.join()


@pytest.mark.slow
def test_more_checks_than_may_wait_are_refused_and_the_server_serves_on(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:", env={"HEADSTART_MAX_WAITING": "0"})
    attack = Attack()
    for number in range(4):
        attack.send("bomb", lambda number=number: ask(server, grammar=bomb(number)))  # type: ignore[misc]
    for thread in attack.threads:
        thread.join()
    assert {answer for _, answer in attack.answers} == {400, 503}
    assert ask(server, response_format=HONEST).status_code == 200


def tool(pattern: str) -> Json:
    parameters = {"type": "object", "properties": {"x": {"type": "string", "pattern": pattern}}}
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


@pytest.mark.slow
def test_checks_that_are_killed_are_done_again_and_nothing_honest_is_called_a_fault(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "toy=toy:")
    assert ask(server, response_format=HONEST).status_code == 200
    over = threading.Event()

    def kill() -> None:
        while not over.is_set():
            for process in checking(server):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            over.wait(0.5)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        forms = [{"type": "regex", "regex": f"[ab]{{{i}}}"} for i in range(1, 15)]
        answers = [ask(server, response_format=form) for form in forms]
        answers += [ask(server, tools=[tool(f"a{{{i}}}")], tool_choice="required") for i in range(1, 5)]
    finally:
        over.set()
        killer.join()
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert {ask(server, response_format=form).status_code for form in forms} == {200}


class Fake(CheckerProcess):
    """Checks that end when they are told to. Grammars named "slow" take too long for the quick lane."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.asked: list[str] = []
        self.may_end: dict[str, asyncio.Event] = {}

    async def fault(self, grammar: str) -> str:
        self.asked.append(grammar)
        end = self.may_end.setdefault(grammar, asyncio.Event())
        if self.seconds == QUICK_SECONDS and "slow" in grammar:
            raise TookTooLong
        if self.seconds == MOST_SECONDS or "held" in grammar:
            await end.wait()
        return "it is bad" if "bad" in grammar else ""

    async def close(self) -> None:
        pass


class Checks:
    """Grammars whose processes are fakes."""

    def __init__(self, max_waiting: int = 10) -> None:
        self.grammars = GrammarChecks(max_waiting)
        self.quick, self.slow = self.grammars._quick.checker, self.grammars._slow.checker
        assert isinstance(self.quick, Fake)
        assert isinstance(self.slow, Fake)

    async def ask(self, *grammars: str, owner: str = "") -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(self.grammars.check(each, "grammar", owner)) for each in grammars]
        await self.settled()
        return tasks

    async def settled(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def end(self, grammar: str) -> None:
        for checker in (self.quick, self.slow):
            assert isinstance(checker, Fake)
            checker.may_end.setdefault(grammar, asyncio.Event()).set()
        await self.settled()

    @property
    def asked(self) -> list[str]:
        """Of the slow lane."""
        assert isinstance(self.slow, Fake)
        return self.slow.asked


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    monkeypatch.setattr(module, "CheckerProcess", Fake)
    return Checks()


async def test_what_takes_long_holds_up_nothing_quick(checks: Checks) -> None:
    slow = await checks.ask(*(f"slow {i}" for i in range(5)))
    (quick,) = await checks.ask("quick")
    assert quick.done()
    assert not any(task.done() for task in slow)
    await checks.grammars.close()


async def test_slow_checks_take_turns_between_owners(checks: Checks) -> None:
    await checks.ask("slow a1", "slow a2", "slow a3", owner="a")
    await checks.ask("slow b1", owner="b")
    await checks.end("slow a1")
    await checks.end("slow a2")
    assert checks.asked == ["slow a1", "slow a2", "slow b1"]
    await checks.grammars.close()


async def test_a_grammar_is_checked_once_however_many_ask(checks: Checks) -> None:
    asking = await checks.ask(*["slow bad"] * 5)
    await checks.end("slow bad")
    for task in asking:
        with pytest.raises(BadRequest, match="it is bad"):
            await task
    with pytest.raises(BadRequest, match="it is bad"):
        await checks.grammars.check("slow bad", "grammar", "another")
    assert checks.asked == ["slow bad"]


async def test_what_one_owner_has_had_checked_another_need_not_wait_for(checks: Checks) -> None:
    (first,) = await checks.ask("slow a", owner="a")
    (other,) = await checks.ask("slow a", owner="b")
    await checks.end("slow a")
    assert first.done()
    assert other.done()
    assert checks.asked == ["slow a"]


async def test_a_check_that_all_have_left_is_not_done(checks: Checks) -> None:
    (running,) = await checks.ask("slow 1")
    leaving = await checks.ask("slow 2", "slow 2")
    leaving[0].cancel()
    await checks.settled()
    leaving[1].cancel()
    await checks.ask("slow 3")
    await checks.end("slow 1")
    assert running.done()
    assert checks.asked == ["slow 1", "slow 3"]
    await checks.grammars.close()


async def test_a_check_that_has_begun_is_remembered_though_all_have_left(checks: Checks) -> None:
    (leaving,) = await checks.ask("slow bad")
    leaving.cancel()
    await checks.settled()
    await checks.end("slow bad")
    with pytest.raises(BadRequest, match="it is bad"):
        await checks.grammars.check("slow bad", "grammar")
    assert checks.asked == ["slow bad"]


async def test_who_comes_back_to_a_check_that_goes_on_gets_its_result(checks: Checks) -> None:
    (leaving,) = await checks.ask("held")
    leaving.cancel()
    (coming,) = await checks.ask("held")
    await checks.end("held")
    assert coming.done()
    await coming


async def test_a_check_left_in_the_quick_lane_goes_to_no_other(checks: Checks) -> None:
    blocking = await checks.ask("held")
    (leaving,) = await checks.ask("slow")
    leaving.cancel()
    await checks.end("held")
    assert all(task.done() for task in blocking)
    assert checks.asked == []


async def test_as_many_checks_wait_as_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CheckerProcess", Fake)
    checks = Checks(max_waiting=2)
    asking = await checks.ask(*(f"held {i}" for i in range(4)))
    assert [task.done() for task in asking] == [False, False, False, True]
    assert isinstance(asking[3].exception(), Overloaded)
    # So many may wait for one check, too.
    same = await checks.ask(*["held 0"] * 4)
    assert [task.done() for task in same] == [False, False, True, True]
    await checks.grammars.close()


async def test_a_real_check_has_its_limit_of_time() -> None:
    checker = CheckerProcess(0.05)
    with pytest.raises(TookTooLong):
        await checker.fault(lark_grammar(bomb(0)))
    process = checker._process
    assert await checker.fault(lark_grammar("start: /a+/")) == ""
    assert checker._process is process
    await checker.close()
