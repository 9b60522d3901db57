"""Many clients at once: they share builds, and replacing or deleting a cache never breaks an answer."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from conftest import Report, StartServer
from servers import RunningServer, eventually, said

PROMPT = "You keep the lighthouse.\n\n" + "Each evening you light the lamp. " * 12
CLIENTS = 8


def _create(server: RunningServer, prompt: str = PROMPT, timeout: float = 60, **more: Any) -> httpx.Response:
    body = {"cache_name": "keeper", "prompt": prompt, **more}
    return httpx.post(f"{server.url}/v1/cache/toy", json=body, timeout=timeout)


def _computed(server: RunningServer) -> float:
    """Milliseconds that the last build took."""
    return float(server.http.get("/v1/cache/toy/keeper").json()["build_ms"])


def _building(server: RunningServer) -> bool:
    return any(".tmp-" in name for name in server.files())


@pytest.mark.slow
def test_creates_of_the_same_at_the_same_time_are_answered_by_one_build(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=1")
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda _: _create(server), range(CLIENTS)))
    assert [answer.status_code for answer in answers] == [200] * CLIENTS
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].json()["version"] == 1
    assert server.files() == ["toy/keeper.headstart"]


def test_who_joins_a_build_sees_its_progress(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=2")

    def follow(_: int) -> str:
        return _create(server, stream=True).text

    with ThreadPoolExecutor(2) as pool:
        streams = list(pool.map(follow, range(2)))
    for stream in streams:
        assert stream.count("cache.progress") > 3
        assert stream.count("cache.created") == 1


def test_a_client_that_leaves_ends_the_build_for_nobody_else(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=2")
    with ThreadPoolExecutor(1) as pool:
        staying = pool.submit(_create, server)
        eventually(lambda: _building(server))
        with pytest.raises(httpx.ReadTimeout):
            _create(server, timeout=0.3)
        assert staying.result().status_code == 200
    assert server.chat("Who?", use_cache="keeper")["usage"]["cache_hit"] is True


def test_the_first_client_may_leave_as_well(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=2")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(_create, server, timeout=0.4)
        eventually(lambda: _building(server))
        second = pool.submit(_create, server)
        with pytest.raises(httpx.ReadTimeout):
            first.result()
        assert second.result().json()["version"] == 1


def test_when_the_last_client_has_left_the_build_ends_and_the_name_is_free(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=2")
    with ThreadPoolExecutor(2) as pool:
        leaving = [pool.submit(_create, server, timeout=0.3) for _ in range(2)]
        for client in leaving:
            with pytest.raises(httpx.ReadTimeout):
                client.result()
    eventually(lambda: server.files() == [], seconds=1)
    assert server.http.get("/v1/cache/toy/keeper").status_code == 404
    # Whoever comes while it is ending is not told that it is being built, nor does he inherit its end.
    with pytest.raises(httpx.ReadTimeout):
        _create(server, timeout=0.3)
    assert _create(server, "Something else. " * 20).status_code == 200


@pytest.mark.parametrize("other", [{"prompt": "Something else."}, {"for": ["chat"]}])
def test_another_create_under_a_name_that_is_being_built_is_refused(
    start_server: StartServer, other: dict[str, Any]
) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=2")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_create, server)
        eventually(lambda: _building(server))
        refused = _create(server, **other)
        assert running.result().status_code == 200
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "cache_conflict"


def test_a_create_during_a_repair_of_the_same_waits_and_computes_nothing(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=2")
    server.create("keeper", PROMPT)
    server.stop()
    path = server.cache_dir / "toy" / "keeper.headstart"
    path.write_bytes(path.read_bytes()[:-10])
    server.start()
    server.chat("Who?", use_cache="keeper", max_tokens=1)
    eventually(lambda: _building(server))
    created = _create(server)
    assert created.status_code == 200
    assert created.json()["version"] == 2
    assert _computed(server) == 0


@pytest.mark.slow
def test_clients_see_one_version_or_none_while_a_cache_is_replaced_deleted_and_made_again(
    start_server: StartServer, report: Report
) -> None:
    server = start_server("--model", "toy=toy:")
    prompts = [PROMPT, "You are the ship. " * 12, "You are the sea, and you are wide. " * 30]
    expected = {said(server.chat("Who?", system=prompt, cache_prompt=False)) for prompt in prompts}
    assert len(expected) == 3
    server.create("keeper", prompts[0])
    done = threading.Event()
    body = {
        "model": "toy",
        "use_cache": "keeper",
        "temperature": 0,
        "max_tokens": 24,
        "messages": [{"role": "user", "content": "Who?"}],
    }

    answers: list[httpx.Response] = []

    def ask(_: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            while not done.is_set():
                answers.append(http.post("/v1/chat/completions", json=body))

    changes: Counter[str] = Counter()

    def is_enough() -> bool:
        n_good = sum(answer.status_code == 200 for answer in answers)
        return n_good > 200 and len(changes) == 3 and min(changes.values()) > 10

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(ask, i) for i in range(CLIENTS)]
        end = time.monotonic() + 80
        while not is_enough() and time.monotonic() < end:
            number = sum(changes.values())
            created = _create(server, prompts[number % 3])
            assert created.status_code == 200, created.text
            changes[created.json()["object"]] += 1
            if number % 3 == 2:
                deleted = server.http.delete("/v1/cache/toy/keeper")
                assert deleted.status_code == 200, deleted.text
                changes["deleted"] += 1
        done.set()
        for client in clients:
            client.result()
    statuses = Counter(answer.status_code for answer in answers)
    report(f"{CLIENTS} clients, {dict(changes)}: answers by status {dict(statuses)}")
    assert statuses.keys() <= {200, 404}
    for answer in answers:
        if answer.status_code == 404:
            assert answer.json()["error"]["code"] == "cache_not_found"
        else:
            assert said(answer.json()) in expected
    assert statuses[200] > 200
    assert min(changes.values()) > 10
