"""`save_as`: a chat is kept with its answer, and the next turn, or another, starts there."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from conftest import StartServer
from servers import Json, RunningServer, events, eventually, said

KEEPER = "You keep the lighthouse and tell what you see in one line. " * 9
SYSTEM = {"role": "system", "content": KEEPER}
CHAT = "/v1/chat/completions"


def _user(text: str) -> Json:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Json:
    return {"role": "assistant", "content": text}


def _ask(server: RunningServer, *messages: Json, **body: Any) -> Json:
    fields = {"model": "toy", "temperature": 0, "max_tokens": 30, **body}
    response = server.post(CHAT, messages=list(messages), **fields)
    assert response.status_code == 200, response.text
    return response.json()


def _shown(server: RunningServer, name: str) -> Json:
    response = server.http.get(f"/v1/cache/toy/{name}")
    assert response.status_code == 200, response.text
    return response.json()


def _is_saved(server: RunningServer, name: str, version: int = 1) -> bool:
    response = server.http.get(f"/v1/cache/toy/{name}")
    return response.status_code == 200 and response.json()["version"] == version


def _check_hit(answer: Json, *names: str, most: int = 60) -> None:
    usage, timings = answer["usage"], answer["timings"]
    assert usage["cache_hit"] is True, usage
    assert usage["cached_prompts"] == list(names)
    assert timings["cache_n"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert timings["prompt_n"] == usage["prompt_tokens"] - timings["cache_n"] <= most < timings["cache_n"]


def _streamed(server: RunningServer, *messages: Json, **body: Any) -> tuple[str, Json]:
    """The text, and the chunk with the finish reason."""
    fields = {"model": "toy", "temperature": 0, "max_tokens": 30, "stream": True, **body}
    with server.http.stream("POST", CHAT, json={"messages": list(messages), **fields}) as response:
        chunks = list(events(response))
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks), chunks[-1]


@pytest.mark.parametrize("template", ["chatml", "fold", "nosystem", "tools"])
def test_the_next_turn_starts_from_the_saved_one_and_says_what_it_says_with_the_history_in_full(
    start_server: StartServer, template: str
) -> None:
    server = start_server("--model", f"toy=toy:template={template}")
    server.create("keeper", KEEPER)
    first = _ask(server, _user("One?"), use_cache="keeper", save_as="talk")
    assert first["saved_as"] == "talk"
    second = _ask(server, _user("Two?"), use_cache="talk", save_as="talk")
    _check_hit(second, "talk")
    server.restart()
    third = _ask(server, _user("Three?"), use_cache="talk")
    _check_hit(third, "talk")
    assert third["timings"]["cache_source"] == "file"
    turns = [SYSTEM, _user("One?"), _assistant(said(first)), _user("Two?"), _assistant(said(second))]
    assert said(second) == said(_ask(server, *turns[:4], cache_prompt=False))
    cold = _ask(server, *turns, _user("Three?"), cache_prompt=False)
    assert said(third) == said(cold)
    assert third["usage"]["prompt_tokens"] == cold["usage"]["prompt_tokens"]


def test_a_saved_chat_is_shown_with_all_that_was_said(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", KEEPER)
    answer = _ask(server, _user("One?"), use_cache="keeper", save_as="talk")
    eventually(lambda: _is_saved(server, "talk"))
    shown = _shown(server, "talk")
    assert shown["origin"] == "conversation"
    assert shown["messages"] == [SYSTEM, _user("One?"), _assistant(said(answer))]
    assert list(shown["forms"]) == ["chat"]


def test_each_turn_replaces_the_one_before_and_only_the_new_is_computed(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=1", "--slots", "1")
    server.create("keeper", KEEPER)
    _ask(server, _user("One?"), use_cache="keeper", save_as="talk")
    for turn in range(2, 4):
        _check_hit(_ask(server, _user("And?"), use_cache="talk", save_as="talk"), "talk")
        eventually(lambda turn=turn: _is_saved(server, "talk", turn))  # type: ignore[misc]
    shown = _shown(server, "talk")
    assert len(shown["messages"]) == 7
    # Two chunks of the chat's some 700 tokens at most are computed again.
    assert 0 < shown["build_ms"] < 250
    assert _shown(server, "keeper")["version"] == 1


def test_the_whole_history_is_reused_without_a_name_too(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    first = _ask(server, SYSTEM, _user("One?"), save_as="talk")
    eventually(lambda: _is_saved(server, "talk"))
    history = [SYSTEM, _user("One?"), _assistant(said(first)), _user("Two?")]
    plain = _ask(server, *history)
    assert plain["timings"]["prompt_n"] <= 40
    named = _ask(server, *history, use_cache="talk")
    _check_hit(named, "talk")
    assert named["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    assert said(named) == said(plain)


def test_two_branches_start_from_one_turn(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    first = _ask(server, SYSTEM, _user("One?"), save_as="root")
    answers = {
        name: _ask(server, _user(f"To the {name}?"), use_cache="root", save_as=name)
        for name in ("left", "right")
    }
    for name, answer in answers.items():
        _check_hit(answer, "root")
        turns = [SYSTEM, _user("One?"), _assistant(said(first)), _user(f"To the {name}?")]
        assert said(answer) == said(_ask(server, *turns, cache_prompt=False))
        following = _ask(server, _user("And then?"), use_cache=name)
        _check_hit(following, name)
        whole = [*turns, _assistant(said(answer)), _user("And then?")]
        assert said(following) == said(_ask(server, *whole, cache_prompt=False))


def test_a_stream_is_saved_as_it_was_sent_and_says_so_in_its_last_chunk(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    text, last = _streamed(server, SYSTEM, _user("One?"), save_as="talk")
    assert last["saved_as"] == "talk"
    _check_hit(_ask(server, _user("Two?"), use_cache="talk"), "talk")
    assert _shown(server, "talk")["messages"][-1] == _assistant(text)


@pytest.mark.parametrize("stream", [False, True])
def test_of_an_answer_ended_by_a_stop_text_the_part_that_was_sent_is_saved(
    start_server: StartServer, stream: bool
) -> None:
    server = start_server("--model", "toy=toy:eos=0")
    whole = said(_ask(server, SYSTEM, _user("One?")))
    stop = whole[12:15]
    expected = whole[: whole.index(stop)]
    body = {"stop": stop, "save_as": "talk"}
    if stream:
        sent, _ = _streamed(server, SYSTEM, _user("One?"), **body)
    else:
        sent = said(_ask(server, SYSTEM, _user("One?"), **body))
    eventually(lambda: _is_saved(server, "talk"))
    assert _shown(server, "talk")["messages"][-1] == _assistant(sent)
    assert sent == expected


def test_the_tools_of_a_chat_are_saved_with_it(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:template=tools")
    tool = {"type": "function", "function": {"name": "light_lamp", "parameters": {}}}
    _ask(server, SYSTEM, _user("One?"), tools=[tool], save_as="talk")
    _check_hit(_ask(server, _user("Two?"), use_cache="talk"), "talk")
    assert _shown(server, "talk")["tools"] == [tool]


def test_a_chat_over_several_caches_is_saved_with_what_they_begin_with(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", KEEPER)
    server.create("style", "Be brief. " * 20)
    _ask(server, _user("One?"), use_cache=["keeper", "style"], save_as="talk")
    _check_hit(_ask(server, _user("Two?"), use_cache="talk"), "talk")
    assert [message["role"] for message in _shown(server, "talk")["messages"]] == [
        *("system", "system", "user", "assistant")
    ]
    names = ["style", "talk"]
    _ask(server, _user("Two?"), use_cache=names)
    _check_hit(_ask(server, _user("Two?"), use_cache=names), *names)


def test_a_turn_that_comes_while_the_one_before_is_being_saved_waits_for_it(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=3")
    server.create("keeper", KEEPER)
    texts = []
    for i in range(3):
        use = "talk" if i else "keeper"
        answer = _ask(server, _user(f"Turn {i}?"), use_cache=use, save_as="talk", max_tokens=5)
        _check_hit(answer, use)
        texts += [f"Turn {i}?", said(answer)]
    eventually(lambda: _is_saved(server, "talk", 3))
    assert [message["content"] for message in _shown(server, "talk")["messages"]] == [KEEPER, *texts]


def test_the_answer_is_sent_before_the_chat_is_saved(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=3")
    server.create("keeper", KEEPER)
    _ask(server, _user("One?"), use_cache="keeper", save_as="talk", max_tokens=5)
    assert server.http.get("/v1/cache/toy/talk").status_code == 404
    eventually(lambda: _is_saved(server, "talk"))


def test_a_server_that_is_stopped_saves_what_it_said_it_would(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=2")
    _ask(server, SYSTEM, _user("One?"), save_as="talk", max_tokens=5)
    assert server.http.get("/v1/cache/toy/talk").status_code == 404
    server.restart()
    _check_hit(_ask(server, _user("Two?"), use_cache="talk", max_tokens=5), "talk")


# Names


def _refused(server: RunningServer, **body: Any) -> tuple[int, str, str]:
    fields = {"model": "toy", "messages": [_user("One?")], "max_tokens": 5, **body}
    response = server.post(CHAT, **fields)
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


@pytest.mark.parametrize("name", ["", "../a", "a b", "x" * 65, "derived-0123"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_name_that_is_none_is_refused_before_anything_is_generated(
    toy: RunningServer, name: str, stream: bool
) -> None:
    assert _refused(toy, save_as=name, stream=stream) == (400, "invalid_cache_name", "save_as")


def test_a_cache_that_is_no_conversation_is_only_replaced_if_so_asked(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("mine", KEEPER)
    for body in ({}, {"allow_overwrite": None}, {"allow_overwrite": False}):
        assert _refused(server, save_as="mine", **body) == (409, "cache_conflict", "save_as")
    assert _shown(server, "mine")["prompt"] == KEEPER
    _ask(server, SYSTEM, _user("One?"), save_as="mine", allow_overwrite=True)
    eventually(lambda: _is_saved(server, "mine", 2))
    assert _shown(server, "mine")["origin"] == "conversation"


def test_a_conversation_is_not_replaced_if_so_asked(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=1")
    _ask(server, SYSTEM, _user("One?"), save_as="talk", max_tokens=5)
    # Now it is being saved, then it is.
    for _ in range(2):
        refused = _refused(server, save_as="talk", allow_overwrite=False)
        assert refused == (409, "cache_conflict", "save_as")
        eventually(lambda: _is_saved(server, "talk"))


def test_completions_are_no_chats_to_be_saved(toy: RunningServer) -> None:
    body = {"model": "toy", "prompt": "a", "save_as": "talk"}
    response = toy.post("/v1/completions", **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "save_as")


def test_a_saved_chat_is_nothing_that_completions_can_use(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    _ask(server, SYSTEM, _user("One?"), save_as="talk")
    body = {"model": "toy", "prompt": "a", "use_cache": "talk"}
    response = server.post("/v1/completions", **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "use_cache")


def test_a_name_that_a_client_builds_meanwhile_is_left_to_it(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=1,eos=0")
    body = {"model": "toy", "messages": [_user("One?")], "max_tokens": 200, "save_as": "mine", "stream": True}
    with server.http.stream("POST", CHAT, json=body) as response:
        chunks = events(response)
        next(chunks)
        httpx.post(f"{server.url}/v1/cache/toy", json={"cache_name": "mine", "prompt": KEEPER}, timeout=60)
        *_, last = chunks
    assert last["saved_as"] == "mine"
    eventually(lambda: "building cache mine" in server.log.read_text())
    assert _shown(server, "mine")["prompt"] == KEEPER
    assert server.chat("Who?", use_cache="mine")["usage"]["cache_hit"] is True


def test_of_two_chats_saved_under_one_name_at_once_one_is_kept_whole(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=1")
    start = threading.Barrier(2)

    def ask(question: str) -> str:
        start.wait()
        return said(_ask(server, SYSTEM, _user(question), save_as="talk", max_tokens=5))

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(ask, ["One?", "Two?"]))
    eventually(lambda: _is_saved(server, "talk", 2))
    turn = _shown(server, "talk")["messages"][1:]
    assert turn in [
        [_user(question), _assistant(answer)]
        for question, answer in zip(["One?", "Two?"], answers, strict=True)
    ]
    _check_hit(_ask(server, _user("And?"), use_cache="talk"), "talk")


# What goes wrong


def test_a_chat_whose_client_leaves_is_not_saved(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=2,eos=0")
    body = {"model": "toy", "messages": [SYSTEM, _user("One?")], "save_as": "talk", "stream": True}
    with server.http.stream("POST", CHAT, json=body) as response:
        next(events(response))
    time.sleep(0.5)
    assert server.files() == []
    assert server.http.get("/v1/cache/toy/talk").status_code == 404


def test_a_chat_whose_worker_dies_is_not_saved(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=2,eos=0")
    body = {"model": "toy", "messages": [SYSTEM, _user("One?")], "save_as": "talk", "stream": True}
    with server.http.stream("POST", CHAT, json=body) as response:
        chunks = events(response)
        next(chunks)
        server.workers()[0].kill()
        *_, last = chunks
    assert last["error"]["code"] == "engine_died"
    eventually(lambda: server.http.get("/ready").status_code == 200)
    assert server.http.get("/v1/cache/toy/talk").status_code == 404


def test_a_chat_that_the_worker_dies_over_while_it_is_saved_is_kept_without_its_state(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=3")
    first = _ask(server, SYSTEM, _user("One?"), save_as="talk", max_tokens=5)
    (worker,) = server.workers()
    worker.kill()
    # Only once there is another worker has the server noticed the death.
    eventually(lambda: any(new.pid != worker.pid for new in server.workers()))
    eventually(lambda: server.http.get("/ready").status_code == 200)
    missed = _ask(server, _user("Two?"), use_cache="talk", max_tokens=5)
    assert missed["usage"]["cache_miss_reason"] == "evicted"
    turns = [SYSTEM, _user("One?"), _assistant(said(first)), _user("Two?")]
    assert said(missed) == said(_ask(server, *turns, cache_prompt=False, max_tokens=5))
    _check_hit(_ask(server, _user("Two?"), use_cache="talk", max_tokens=5), "talk")


def test_after_a_turn_that_could_not_be_saved_the_next_one_is_told_so_and_nothing_is_lost(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "toy=toy:")
    first = _ask(server, SYSTEM, _user("One?"), save_as="talk")
    eventually(lambda: _is_saved(server, "talk"))
    (worker,) = server.workers()
    worker.rlimit(psutil.RLIMIT_FSIZE, (100, psutil.RLIM_INFINITY))
    second = _ask(server, _user("Two?"), use_cache="talk", save_as="talk")
    response = server.post(CHAT, model="toy", messages=[_user("Three?")], use_cache="talk")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (507, "storage_full", "use_cache")
    assert "The last turn of 'talk' was not saved" in error["message"]
    assert response.headers["x-should-retry"] == "false"
    assert len(_shown(server, "talk")["messages"]) == 3
    worker.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
    history = [SYSTEM, _user("One?"), _assistant(said(first)), _user("Two?"), _assistant(said(second))]
    _ask(server, *history, _user("Three?"), save_as="talk")
    _check_hit(_ask(server, _user("Four?"), use_cache="talk"), "talk")
    assert len(_shown(server, "talk")["messages"]) == 7


def test_a_chat_too_long_to_go_on_is_kept_and_says_so_when_it_is_used(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:eos=0,ctx=200")
    _ask(server, _user("One?"), max_tokens=500, save_as="talk")
    eventually(lambda: _is_saved(server, "talk"))
    assert len(_shown(server, "talk")["messages"]) == 2
    assert _refused(server, use_cache="talk")[:2] == (400, "context_length_exceeded")


@pytest.mark.real_model
@pytest.mark.timeout(600)
def test_a_real_model_goes_on_from_a_saved_chat_as_from_the_whole_history(start_server: StartServer) -> None:
    server = start_server()
    body = {"model": "smollm2", "max_tokens": 24}
    server.create("keeper", KEEPER, model="smollm2", **{"for": ["chat"]})
    first = _ask(server, _user("What do you see?"), use_cache="keeper", save_as="talk", **body)
    second = _ask(server, _user("Tell me more."), use_cache="talk", **body)
    server.restart()
    restarted = _ask(server, _user("Tell me more."), use_cache="talk", **body)
    for answer in (second, restarted):
        _check_hit(answer, "talk")
    turns = [SYSTEM, _user("What do you see?"), _assistant(said(first)), _user("Tell me more.")]
    assert said(second) == said(restarted) == said(_ask(server, *turns, cache_prompt=False, **body))
