"""Several caches in one request: what they are together is computed once, from what the first of them has."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import StartServer, beside_smollm2
from driver import CHUNK, PROMPT, Driver, small_model
from servers import Json, RunningServer, eventually, said

COMPANY = "You answer for the harbour company and know all of its rules. " * 9
STYLE = "You write short sentences and never use a number. " * 9
BOTH = ["company", "style"]
LAST = {"role": "user", "content": "Who is there?"}


def _system(text: str) -> Json:
    return {"role": "system", "content": text}


def _ask(server: RunningServer, *messages: Json, **body: Any) -> Json:
    fields = {"model": "toy", "temperature": 0, "max_tokens": 24, **body}
    response = server.post("/v1/chat/completions", messages=[*messages, LAST], **fields)
    assert response.status_code == 200, response.text
    return response.json()


def _complete(server: RunningServer, prompt: str, **body: Any) -> Json:
    fields = {"model": "toy", "temperature": 0, "max_tokens": 24, **body}
    response = server.post("/v1/completions", prompt=prompt, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def _with_parts(server: RunningServer) -> RunningServer:
    server.create("company", COMPANY)
    server.create("style", STYLE)
    return server


def _derived(server: RunningServer) -> list[Json]:
    caches = server.http.get("/v1/cache").json()["data"]
    return [cache for cache in caches if cache["cache_name"].startswith("derived-")]


def _check_hit(answer: Json, names: list[str]) -> None:
    usage, timings = answer["usage"], answer["timings"]
    assert usage["cache_hit"] is True, usage
    assert usage["cached_prompts"] == names
    assert "cache_miss_reason" not in usage
    assert timings["cache_n"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert timings["prompt_n"] == usage["prompt_tokens"] - timings["cache_n"] <= 40 < timings["cache_n"]


def _check_first_use(answer: Json, tokens_of_first: int) -> None:
    usage, timings = answer["usage"], answer["timings"]
    assert usage["cache_hit"] is False
    assert usage["cached_prompts"] == []
    assert usage["cache_miss_reason"] == "first_use"
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert tokens_of_first - 64 - 8 < cached <= tokens_of_first
    assert cached % 64 == 0
    assert (timings["cache_n"], timings["prompt_n"]) == (cached, usage["prompt_tokens"] - cached)


@pytest.mark.parametrize("template", ["chatml", "fold", "nosystem", "tools"])
def test_a_chat_with_two_caches_says_what_it_says_with_both_system_messages_in_full(
    start_server: StartServer, template: str
) -> None:
    server = _with_parts(start_server("--model", f"toy=toy:template={template}"))
    cold = _ask(server, _system(COMPANY), _system(STYLE), cache_prompt=False)
    server.restart()
    first = _ask(server, use_cache=BOTH)
    assert first["usage"]["cache_miss_reason"] == "first_use"
    assert first["timings"]["cache_source"] == "file"
    second = _ask(server, use_cache=BOTH)
    server.restart()
    third = _ask(server, use_cache=BOTH)
    assert third["timings"]["cache_source"] == "file"
    for answer in (second, third):
        _check_hit(answer, BOTH)
    for answer in (first, second, third):
        assert said(answer) == said(cold)
        assert answer["usage"]["prompt_tokens"] == cold["usage"]["prompt_tokens"]


def test_a_completion_with_two_caches_begins_with_both_texts(start_server: StartServer) -> None:
    server = _with_parts(start_server("--model", "toy=toy:"))
    cold = _complete(server, COMPANY + STYLE + "def light", cache_prompt=False)
    server.restart()
    tokens = server.http.get("/v1/cache/toy/company").json()["forms"]["completion"]["tokens"]
    first = _complete(server, "def light", use_cache=BOTH)
    _check_first_use(first, tokens)
    second = _complete(server, "def light", use_cache=BOTH)
    server.restart()
    third = _complete(server, "def light", use_cache=BOTH)
    for answer in (second, third):
        _check_hit(answer, BOTH)
    assert said(cold) == said(first) == said(second) == said(third)


def test_the_first_use_starts_from_the_first_cache_up_to_where_both_prefills_are_cut(
    start_server: StartServer,
) -> None:
    server = _with_parts(start_server("--model", "toy=toy:"))
    server.restart()
    tokens = server.http.get("/v1/cache/toy/company").json()["forms"]["chat"]["tokens"]
    _check_first_use(_ask(server, use_cache=BOTH), tokens)


def test_the_derived_state_itself_is_computed_from_the_first_cache_only_once(
    start_server: StartServer,
) -> None:
    server = _with_parts(start_server("--model", "toy=toy:ms_per_token=1", "--slots", "1"))
    whole = server.http.get("/v1/cache/toy/company").json()["build_ms"] / 2
    server.restart()
    _ask(server, use_cache=BOTH)
    _check_hit(_ask(server, use_cache=BOTH), BOTH)
    (derived,) = _derived(server)
    assert list(derived["forms"]) == ["chat"]
    # Some 450 tokens of 1,050 are the company's.
    assert 0 < derived["build_ms"] < 1.5 * whole
    server.restart()
    _check_hit(_ask(server, use_cache=BOTH), BOTH)
    assert [(d["version"], d["build_ms"]) for d in _derived(server)] == [(1, derived["build_ms"])]


def test_a_derived_cache_tells_what_it_is_composed_of(start_server: StartServer) -> None:
    server = _with_parts(start_server("--model", "toy=toy:"))
    _ask(server, use_cache=BOTH)
    eventually(lambda: len(_derived(server)) == 1)
    name = _derived(server)[0]["cache_name"]
    shown = server.http.get(f"/v1/cache/toy/{name}").json()
    assert (shown["origin"], shown["parts"]) == ("derived", BOTH)
    assert shown["messages"] == [_system(COMPANY), _system(STYLE)]


def test_another_order_is_another_prompt(start_server: StartServer) -> None:
    server = _with_parts(start_server("--model", "toy=toy:"))
    turned = BOTH[::-1]
    for names in (BOTH, turned):
        _ask(server, use_cache=names)
        _check_hit(_ask(server, use_cache=names), names)
    assert len(_derived(server)) == 2
    cold = _ask(server, _system(STYLE), _system(COMPANY), cache_prompt=False)
    assert said(_ask(server, use_cache=turned)) == said(cold)


def test_messages_and_tools_of_all_parts_are_put_one_after_the_other(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:template=tools")
    tools = [{"type": "function", "function": {"name": f"tool_{i}", "parameters": {}}} for i in range(3)]
    turns = [{"role": "user", "content": "One? " * 20}, {"role": "assistant", "content": "Yes. " * 20}]
    for name, messages, some in (
        ("rules", [_system(COMPANY)], tools[:2]),
        ("examples", turns, tools[1:]),
    ):
        body = {"cache_name": name, "messages": messages, "tools": some}
        assert server.post("/v1/cache/toy", **body).status_code == 200
    server.create("style", STYLE)
    names = ["rules", "style", "examples"]
    cold = _ask(server, _system(COMPANY), _system(STYLE), *turns, tools=tools, cache_prompt=False)
    for _ in range(2):
        answer = _ask(server, use_cache=names)
        assert said(answer) == said(cold)
        assert answer["usage"]["prompt_tokens"] == cold["usage"]["prompt_tokens"]
    _check_hit(answer, names)


def test_a_system_message_that_the_parts_begin_with_is_not_repeated(start_server: StartServer) -> None:
    server = _with_parts(start_server("--model", "toy=toy:"))
    _ask(server, use_cache=BOTH)
    plain = _ask(server, use_cache=BOTH)
    for repeated in ([_system(COMPANY)], [_system(COMPANY), _system(STYLE)]):
        answer = _ask(server, *repeated, use_cache=BOTH)
        _check_hit(answer, BOTH)
        assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


def test_a_list_with_one_name_is_the_same_as_the_name(start_server: StartServer) -> None:
    server = _with_parts(start_server("--model", "toy=toy:"))
    _check_hit(_ask(server, use_cache=["company"]), ["company"])
    assert said(_ask(server, use_cache=["company"])) == said(_ask(server, use_cache="company"))
    assert _derived(server) == []


@pytest.mark.parametrize("change", ["replaced", "deleted"])
@pytest.mark.parametrize("name", BOTH)
def test_with_a_part_the_states_derived_from_it_go(start_server: StartServer, change: str, name: str) -> None:
    server = _with_parts(start_server("--model", "toy=toy:"))
    server.create("tide", "You know the tides of the whole year. " * 6)
    for names in (BOTH, ["tide", name]):
        _ask(server, use_cache=names)
        _check_hit(_ask(server, use_cache=names), names)
    _ask(server, use_cache=["tide", *[part for part in BOTH if part != name]])
    eventually(lambda: len(_derived(server)) == 3)
    if change == "replaced":
        server.create(name, "You are the ship. " * 20)
    else:
        assert server.http.delete(f"/v1/cache/toy/{name}").status_code == 200
    assert len(_derived(server)) == 1
    assert sum("derived-" in file for file in server.files()) == 1
    body = {"model": "toy", "messages": [LAST], "use_cache": BOTH}
    if change == "replaced":
        answer = _ask(server, use_cache=BOTH)
        assert answer["usage"]["cache_miss_reason"] == "first_use"
        texts = {"company": COMPANY, "style": STYLE, name: "You are the ship. " * 20}
        cold = _ask(server, *(_system(texts[part]) for part in BOTH), cache_prompt=False)
        assert said(answer) == said(cold)
    else:
        assert server.post("/v1/chat/completions", **body).status_code == 404


def test_a_part_created_again_as_it_was_leaves_the_derived_state(start_server: StartServer) -> None:
    server = _with_parts(start_server("--model", "toy=toy:"))
    _ask(server, use_cache=BOTH)
    _check_hit(_ask(server, use_cache=BOTH), BOTH)
    server.create("style", STYLE)
    _check_hit(_ask(server, use_cache=BOTH), BOTH)


def test_a_part_deleted_while_the_derived_state_is_built_leaves_none_behind(
    start_server: StartServer,
) -> None:
    server = _with_parts(start_server("--model", "toy=toy:ms_per_token=1"))
    _ask(server, use_cache=BOTH, max_tokens=1)
    assert server.http.delete("/v1/cache/toy/style").status_code == 200
    # Being built it can't be replaced, which tells when that is over.
    server.create("other", "Something else. " * 60)
    eventually(lambda: server.files() == ["toy/company.headstart", "toy/other.headstart"])
    assert _derived(server) == []


def test_requests_that_come_while_the_derived_state_is_built_wait_and_hit(start_server: StartServer) -> None:
    server = _with_parts(start_server("--model", "toy=toy:ms_per_token=1"))
    _ask(server, use_cache=BOTH, max_tokens=1)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: _ask(server, use_cache=BOTH), range(3)))
    for answer in answers:
        _check_hit(answer, BOTH)
    assert len({said(answer) for answer in answers}) == len(_derived(server)) == 1


def test_first_uses_at_the_same_time_make_one_derived_state(start_server: StartServer) -> None:
    server = _with_parts(start_server("--model", "toy=toy:ms_per_token=1"))
    start = threading.Barrier(3)

    def ask(_: int) -> Json:
        start.wait()
        return _ask(server, use_cache=BOTH)

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(ask, range(3)))
    assert len({said(answer) for answer in answers}) == 1
    _check_hit(_ask(server, use_cache=BOTH), BOTH)
    assert [derived["version"] for derived in _derived(server)] == [1]


def test_a_damaged_derived_state_is_computed_again(start_server: StartServer) -> None:
    server = _with_parts(start_server("--model", "toy=toy:"))
    expected = said(_ask(server, use_cache=BOTH))
    _check_hit(_ask(server, use_cache=BOTH), BOTH)
    (path,) = (server.cache_dir / "toy").glob("derived-*")
    path.write_bytes(path.read_bytes()[:-10])
    missed = _ask(server, use_cache=BOTH)
    assert missed["usage"]["cache_miss_reason"] == "corrupt"
    hit = _ask(server, use_cache=BOTH)
    _check_hit(hit, BOTH)
    assert said(missed) == said(hit) == expected


def test_a_derived_state_that_can_not_be_written_is_tried_again_and_costs_no_answer(
    start_server: StartServer,
) -> None:
    server = _with_parts(start_server("--model", "toy=toy:"))
    expected = said(_ask(server, _system(COMPANY), _system(STYLE), cache_prompt=False))
    (worker,) = server.workers()
    worker.rlimit(psutil.RLIMIT_FSIZE, (100, psutil.RLIM_INFINITY))
    answers = [_ask(server, use_cache=BOTH) for _ in range(2)]
    eventually(lambda: "building cache derived-" in server.log.read_text())
    worker.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
    assert {said(answer) for answer in answers} == {expected}
    _ask(server, use_cache=BOTH)
    _check_hit(_ask(server, use_cache=BOTH), BOTH)


def test_without_reuse_several_caches_are_read_in_full(start_server: StartServer) -> None:
    server = _with_parts(start_server("--model", "toy=toy:"))
    answer = _ask(server, use_cache=BOTH, cache_prompt=False)
    assert answer["usage"]["cache_miss_reason"] == "cache_prompt_false"
    assert answer["timings"]["cache_n"] == 0
    assert _derived(server) == []


def test_where_states_can_not_be_cut_the_derived_state_is_computed_whole_and_hits(
    start_server: StartServer,
) -> None:
    server = _with_parts(start_server("--model", "toy=toy:can_cut=0"))
    cold = _ask(server, _system(COMPANY), _system(STYLE), cache_prompt=False)
    server.restart()
    first = _ask(server, use_cache=BOTH)
    assert first["usage"]["cache_miss_reason"] == "first_use"
    assert first["timings"]["cache_n"] == 0
    for _ in range(2):
        hit = _ask(server, use_cache=BOTH)
        _check_hit(hit, BOTH)
        assert said(cold) == said(first) == said(hit)
        server.restart()


@pytest.fixture(scope="module")
def parts(toy: RunningServer) -> RunningServer:
    for i in range(9):
        toy.create(f"part{i}", f"Part {i} of nine. " * 4)
    assert toy.post("/v1/cache/toy", cache_name="chats", messages=[LAST]).status_code == 200
    return toy


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("names", "status", "code", "words"),
    [
        ([], 400, "invalid_value", "names no cache"),
        ([f"part{i}" for i in range(9)], 400, "invalid_value", "8 is the most"),
        (["part1", "part2", "part1"], 400, "invalid_value", "'part1' more than once"),
        (["part1", "../part2"], 400, "invalid_cache_name", "'../part2'"),
        (["part1", "never-made"], 404, "cache_not_found", "'never-made'"),
        (["part1", 5], 400, "invalid_value", "use_cache"),
    ],
    ids=str,
)
def test_a_list_of_names_that_makes_no_sense_is_refused(
    parts: RunningServer, path: str, names: list[Any], status: int, code: str, words: str
) -> None:
    body = {"model": "toy", "messages": [LAST], "prompt": "a", "use_cache": names}
    response = parts.post(path, **body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, "use_cache")
    assert words in error["message"]


def test_a_derived_cache_is_no_part_of_another_and_its_name_can_not_be_given(parts: RunningServer) -> None:
    names = ["part3", "part4"]
    _ask(parts, use_cache=names)
    _check_hit(_ask(parts, use_cache=names, max_tokens=2), names)
    name = next(d["cache_name"] for d in _derived(parts))
    body = {"model": "toy", "messages": [LAST], "use_cache": [name, "part5"]}
    refused = parts.post("/v1/chat/completions", **body)
    assert refused.status_code == 400
    assert "is derived from others" in refused.json()["error"]["message"]
    taken = parts.post("/v1/cache/toy", cache_name=name, prompt="Mine.")
    assert (taken.status_code, taken.json()["error"]["code"]) == (400, "invalid_cache_name")


def test_completions_can_not_use_a_part_that_holds_messages(parts: RunningServer) -> None:
    body = {"model": "toy", "prompt": "a", "use_cache": ["part1", "chats"]}
    response = parts.post("/v1/completions", **body)
    assert response.status_code == 400
    assert "'chats' holds chat messages" in response.json()["error"]["message"]


# The engine: the state of another opening


@pytest.mark.parametrize("shared", [15, 16, 40, 69, 70])
def test_a_state_of_another_opening_is_used_up_to_the_last_cut_both_have(
    driver: Driver, tmp_path: Path, shared: int
) -> None:
    other = [*PROMPT[:shared], *(3 for _ in PROMPT[shared:70])][:70]
    cold, _ = driver.run(PROMPT, boundary=90, reuse=False)
    state = driver.save(other, tmp_path / "state")
    driver.evict()
    warm, end = driver.run(PROMPT, boundary=90, restore=state, shared=shared)
    assert warm == cold
    assert end.stats.cached_tokens == shared // CHUNK * CHUNK
    assert end.stats.source == ("file" if shared >= CHUNK else "none")


@beside_smollm2
def test_a_state_that_starts_from_another_has_the_bytes_of_a_cold_one(driver: Driver, tmp_path: Path) -> None:
    driver.save(PROMPT, tmp_path / "cold")
    state = driver.save(PROMPT[:70], tmp_path / "part")
    driver.evict()
    driver.save(PROMPT, tmp_path / "warm", restore=state, shared=70)
    assert (tmp_path / "warm").read_bytes() == (tmp_path / "cold").read_bytes()


@beside_smollm2
def test_a_state_is_never_saved_from_decoded_values(driver: Driver, tmp_path: Path) -> None:
    answer, _ = driver.run(PROMPT, 20)
    whole = [*PROMPT, *answer]
    driver.save(whole, tmp_path / "after")
    driver.evict()
    driver.save(whole, tmp_path / "cold")
    assert (tmp_path / "after").read_bytes() == (tmp_path / "cold").read_bytes()


def test_a_slot_that_holds_the_whole_opening_is_better_than_a_state_of_its_beginning(
    driver: Driver, tmp_path: Path
) -> None:
    state = driver.save(PROMPT[:40], tmp_path / "part")
    cold, _ = driver.run(PROMPT, boundary=90)
    warm, end = driver.run([*PROMPT[:90], 11, 12], boundary=90, restore=state, shared=40)
    assert (end.stats.cached_tokens, end.stats.source) == (90, "slot")
    assert len(warm) == len(cold)


def test_a_model_that_can_not_cut_takes_nothing_of_another_state(tmp_path: Path) -> None:
    driver = Driver(small_model("toy:eos=0,can_cut=0"))
    state = driver.save(PROMPT[:64], tmp_path / "part")
    driver.evict()
    _, end = driver.run(PROMPT, boundary=90, restore=state, shared=64)
    assert end.stats.cached_tokens == 0


@pytest.mark.real_model
@pytest.mark.timeout(600)
def test_a_real_model_says_the_same_with_two_caches_as_with_both_in_full(start_server: StartServer) -> None:
    server = start_server()
    for name, prompt in zip(BOTH, (COMPANY, STYLE), strict=True):
        server.create(name, prompt, model="smollm2", **{"for": ["chat"]})
    body = {"model": "smollm2", "max_tokens": 32}
    cold = _ask(server, _system(COMPANY), _system(STYLE), cache_prompt=False, **body)
    server.restart()
    first = _ask(server, use_cache=BOTH, **body)
    assert first["usage"]["cache_miss_reason"] == "first_use"
    assert first["timings"]["cache_n"] > 0
    second = _ask(server, use_cache=BOTH, **body)
    server.restart()
    third = _ask(server, use_cache=BOTH, **body)
    for answer in (second, third):
        _check_hit(answer, BOTH)
    assert said(cold) == said(first) == said(second) == said(third)
