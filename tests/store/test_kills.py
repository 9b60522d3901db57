"""Killed at any moment: every cache is whole or absent, what was acknowledged is there, nothing else is.

What this shows of a power failure is limited: a killed process loses nothing that it gave to the system.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from conftest import Report
from ledger import NAMES, Ledger
from servers import RunningServer, eventually, running_server, said

STORE_ROUNDS = 150
SERVER_ROUNDS = 26
WORKER_ROUNDS = 26
FILLER = " You answer in one sentence, and you never guess." * 4


@pytest.mark.slow
def test_a_store_killed_at_any_moment_has_every_cache_whole_or_not_at_all(
    tmp_path: Path, report: Report
) -> None:
    script = str(Path(__file__).parents[1] / "helpers" / "store_kills.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(tmp_path / f"cache{i}"), str(STORE_ROUNDS // 2), str(1000 * i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    counts: Counter[str] = Counter()
    for process in processes:
        output, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
        counts.update(json.loads(output))
    report(", ".join(f"{what}: {n}" for what, n in sorted(counts.items())))
    assert counts["rounds"] == STORE_ROUNDS
    for operation in ("create", "replace", "delete", "evict"):
        assert counts[f"{operation} acknowledged"] > 10
    assert counts["temporary files left"] > 10


def _prompt(name: str, version: int) -> str:
    return f"You are {name}, version {version}.{FILLER}"


def _version(prompt: str) -> int:
    return int(prompt.partition(".")[0].split()[-1])


# What is done with a cache: whether there must be one before, whether there is one after, and how.
Send = Callable[[httpx.Client, str, int], httpx.Response]


def _create(http: httpx.Client, name: str, version: int) -> httpx.Response:
    return http.post("/v1/cache/toy", json={"cache_name": name, "prompt": _prompt(name, version)})


def _delete(http: httpx.Client, name: str, _: int) -> httpx.Response:
    return http.delete(f"/v1/cache/toy/{name}")


OPERATIONS: dict[str, tuple[bool, bool, Send]] = {
    "create": (False, True, _create),
    "replace": (True, True, _create),
    "delete": (True, False, _delete),
}


class Victim:
    """A server that is worked on and killed, again and again."""

    def __init__(self, server: RunningServer, seed: int) -> None:
        self.server = server
        self.rng = random.Random(seed)
        self.ledger = Ledger()
        self.version = 0

    def work(self, over: threading.Event) -> None:
        """Operations one after the other, until one fails or it is over."""
        with httpx.Client(base_url=self.server.url, timeout=30) as http:
            while not over.is_set():
                self.version += 1
                name = self.rng.choice(NAMES)
                there = self.ledger.kept[name] is not None
                what = self.rng.choice([w for w, (before, _, _) in OPERATIONS.items() if before == there])
                _, after, send = OPERATIONS[what]
                self.ledger.begin(what, name, self.version if after else None)
                try:
                    response = send(http, name, self.version)
                except httpx.TransportError:
                    return
                if response.status_code != 200:
                    assert response.json()["error"]["code"] in ("engine_died", "model_loading"), response.text
                    self.ledger.refused()
                    return
                self.ledger.done()

    def killed(self, kill: Callable[[], None]) -> None:
        """`kill` at a random moment of the work."""
        over = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            working = pool.submit(self.work, over)
            time.sleep(self.rng.uniform(0, 0.08))
            kill()
            over.set()
            working.result()

    def check(self) -> None:
        server = self.server
        eventually(lambda: server.http.get("/ready").status_code == 200)
        found: dict[str, int | None] = dict.fromkeys(NAMES)
        for name in NAMES:
            shown = server.http.get(f"/v1/cache/toy/{name}")
            if shown.status_code == 404:
                continue
            prompt = shown.json()["prompt"]
            found[name] = _version(prompt)
            warm = server.chat("Who?", use_cache=name, max_tokens=12)
            assert warm["usage"]["cache_hit"] is True
            cold = server.chat("Who?", system=prompt, cache_prompt=False, max_tokens=12)
            assert said(warm) == said(cold)
        there = sorted(f"toy/{name}.headstart" for name, version in found.items() if version is not None)
        assert server.files() == there
        self.ledger.settle(found)

    def kill_server(self) -> None:
        self.server.process.kill()
        self.server.process.wait(10)

    def kill_worker(self) -> None:
        self.server.workers()[0].kill()


def _killed_servers(tmp_path: Path, rounds: int, one_round: Callable[[Victim], None]) -> Counter[str]:
    """What happened in so many rounds, on two servers at once."""

    def run(i: int) -> Counter[str]:
        with running_server(tmp_path / f"cache{i}", "--model", "toy=toy:") as server:
            victim = Victim(server, seed=i)
            for _ in range(rounds // 2):
                one_round(victim)
                victim.check()
            return victim.ledger.counts

    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(run, range(2)), Counter())


def _killed(counts: Counter[str]) -> int:
    return sum(n for what, n in counts.items() if what.startswith("killed"))


@pytest.mark.slow
def test_a_server_killed_at_any_moment_has_every_cache_whole_or_not_at_all(
    tmp_path: Path, report: Report
) -> None:
    def one_round(victim: Victim) -> None:
        victim.killed(victim.kill_server)
        victim.server.http.close()
        victim.server.start()

    counts = _killed_servers(tmp_path, SERVER_ROUNDS, one_round)
    report(", ".join(f"{what}: {n}" for what, n in sorted(counts.items())))
    assert _killed(counts) == SERVER_ROUNDS


@pytest.mark.slow
def test_a_worker_killed_at_any_moment_leaves_every_cache_as_it_was_acknowledged(
    tmp_path: Path, report: Report
) -> None:
    def one_round(victim: Victim) -> None:
        workers = victim.server.workers()
        victim.killed(victim.kill_worker)
        eventually(lambda: victim.server.workers() not in ([], workers))

    counts = _killed_servers(tmp_path, WORKER_ROUNDS, one_round)
    report(", ".join(f"{what}: {n}" for what, n in sorted(counts.items())))
    assert _killed(counts) == WORKER_ROUNDS


def test_the_ledger_notices_what_is_lost_and_what_is_half() -> None:
    ledger = Ledger()
    ledger.begin("create", "one", 1)
    ledger.done()
    ledger.begin("replace", "one", 2)
    with pytest.raises(AssertionError):
        ledger.settle({"one": None, "two": None, "three": None})
    with pytest.raises(AssertionError):
        ledger.settle({"one": 1, "two": 2, "three": None})
    ledger.settle({"one": 2, "two": None, "three": None})
    ledger.begin("replace", "one", 3)
    ledger.refused()
    with pytest.raises(AssertionError):
        ledger.settle({"one": 3, "two": None, "three": None})
