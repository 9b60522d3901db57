"""Why a request started from a cache or didn't: told when it is asked for, and true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from conftest import StartServer
from headstart.service.generation.explain import longest_match
from servers import Json, RunningServer, events, eventually

PROMPT = "You keep the lighthouse of Fastnet. " + "Each evening you light the lamp. " * 12


@pytest.fixture
def server(start_server: StartServer) -> RunningServer:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    server.create("pirate", "You are a pirate. " * 20)
    return server


def _explained(server: RunningServer, text: str = "Who?", **more: Any) -> Json:
    answer = server.chat(text, explain_cache=True, **more)
    explanation: Json = answer["cache_explanation"]
    return explanation


def _diverging(told: Json) -> tuple[int, str, str]:
    """The first token that differs as the reason names it: its number, in the prompt, and in the cache."""
    found = re.search(r"Token (\d+) is '(.+?)', in the cache '(.+?)'\.", told["reason"])
    assert found, told["reason"]
    number, of_prompt, of_cache = found.groups()
    return int(number), of_prompt, of_cache


def test_an_explanation_comes_only_when_it_is_asked_for(server: RunningServer) -> None:
    assert "cache_explanation" not in server.chat("Who?", use_cache="keeper")
    assert "cache_explanation" in server.chat("Who?", use_cache="keeper", explain_cache=True)
    body = {"model": "toy", "prompt": "x", "max_tokens": 1}
    asked = server.http.post("/v1/completions", json=body, headers={"x-headstart-explain": "1"}).json()
    not_asked = server.http.post("/v1/completions", json=body, headers={"x-headstart-explain": "0"}).json()
    assert "cache_explanation" in asked
    assert "cache_explanation" not in not_asked


def test_a_hit_is_explained(server: RunningServer) -> None:
    told = _explained(server, use_cache="keeper")
    assert told["closest_cache"] == "keeper"
    assert told["matched_tokens"] > 100
    assert told["cache_tokens"] - told["matched_tokens"] in (0, 1)
    assert "started from the state of 'keeper'" in told["reason"]


@pytest.mark.parametrize(
    ("system", "before", "cache_has", "prompt_has"),
    [
        (PROMPT.replace("Fastnet", "Skellig"), "lighthouse of ", "Fastnet", "Skellig"),
        ("Y" + PROMPT[1:].replace("lamp", "fire"), "you light the ", "lamp", "fire"),
        (" " + PROMPT, "<|im_start|>system\n", "You keep", " You keep"),
    ],
)
def test_a_request_without_a_name_is_told_where_it_leaves_the_closest_cache(
    server: RunningServer, system: str, before: str, cache_has: str, prompt_has: str
) -> None:
    told = _explained(server, system=system)
    assert told["closest_cache"] == "keeper"
    assert told["first_difference"] == told["matched_tokens"]
    assert told["text_before"].endswith(before)
    assert told["cache_text"].startswith(cache_has)
    assert told["prompt_text"].startswith(prompt_has)
    assert max(len(told[side]) for side in ("text_before", "cache_text", "prompt_text")) <= 40
    assert "names no cache" in told["reason"]
    assert "then differs" in told["reason"]
    number, of_prompt, of_cache = _diverging(told)
    assert number == told["first_difference"]
    assert of_prompt != of_cache
    assert told["prompt_text"].startswith(of_prompt)
    assert told["cache_text"].startswith(of_cache)


def test_a_request_that_begins_with_all_of_a_cache_is_told_to_name_it(server: RunningServer) -> None:
    body = {"model": "toy", "prompt": PROMPT + "\nWho?", "explain_cache": True, "max_tokens": 1}
    told = server.post("/v1/completions", **body).json()["cache_explanation"]
    assert told["closest_cache"] == "keeper"
    assert told["matched_tokens"] == told["cache_tokens"]
    assert told["first_difference"] is None
    assert "use_cache" in told["reason"]


def test_where_there_is_no_cache_that_is_said(start_server: StartServer) -> None:
    told = _explained(start_server("--model", "toy=toy:"))
    assert told["closest_cache"] is None
    assert "there is none" in told["reason"]


def test_the_last_chunk_of_a_stream_has_the_explanation(server: RunningServer) -> None:
    body = {
        "model": "toy",
        "messages": [{"role": "user", "content": "x"}],
        "use_cache": "keeper",
        "stream": True,
        "explain_cache": True,
        "max_tokens": 3,
    }
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        *others, last = list(events(response))
    assert last["cache_explanation"]["closest_cache"] == "keeper"
    assert not any("cache_explanation" in chunk for chunk in others)


def test_a_miss_is_explained_in_words_with_what_has_changed(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    server.stop()
    changed = start_server("--model", "toy=toy:", env={"HEADSTART_FLASH_ATTENTION": "true"})
    told = _explained(changed, use_cache="keeper")
    assert "was not used: it was computed with other settings" in told["reason"]
    assert "flash attention is on, was off" in told["reason"]
    assert told["matched_tokens"] > 100


def test_a_cache_for_the_other_endpoint_is_named_as_the_reason(server: RunningServer) -> None:
    server.post("/v1/cache/toy", cache_name="text", prompt=PROMPT, **{"for": ["completion"]})
    told = _explained(server, use_cache="text")
    assert "created for the other endpoint only" in told["reason"]


def test_timings_tell_how_much_of_the_prompt_the_closest_known_state_has(server: RunningServer) -> None:
    named = server.chat("Who?", use_cache="keeper")["timings"]
    assert named["prefix_match_n"] == named["cache_n"] > 100
    computed = server.chat("Who?", system=PROMPT, cache_prompt=False)["timings"]
    assert computed["cache_n"] == 0
    assert computed["prefix_match_n"] >= named["cache_n"]
    other = server.chat("Who?", system="You" + "keeper" * 10, cache_prompt=False)["timings"]
    assert 0 < other["prefix_match_n"] < 20


def test_of_many_lists_the_one_with_the_longest_common_beginning_counts() -> None:
    tokens = [1, 2, 3, 4, 5]
    assert longest_match([], tokens) == 0
    assert longest_match([[9], [1, 2, 9], [1], [1, 2, 3, 4, 9], [1, 2, 3]], tokens) == 4
    assert longest_match([[1, 2, 3, 4, 5, 6], [1]], tokens) == 5
    assert longest_match([[1, 2]], []) == 0


def test_a_request_without_any_cache_is_told_where_it_leaves_the_one_before(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "toy=toy:", "--slots", "1")
    assert "first that was computed" not in _explained(server, system=PROMPT)["reason"]
    answer = server.chat("Where?", system=PROMPT, explain_cache=True)
    n = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    told = answer["cache_explanation"]
    assert (told["closest_cache"], n > 100) == (None, True)
    assert f"{n} tokens were still in memory; the first that was computed is token {n}, '" in told["reason"]


def test_what_was_read_from_a_file_is_not_told_to_be_from_memory(server: RunningServer) -> None:
    server.restart()
    told = _explained(server, system=PROMPT)
    assert "tokens were read from a cache's file; the first that was computed is token" in told["reason"]
    server.restart()
    assert "tokens were read from a cache's file" in _explained(server, use_cache="keeper")["reason"]
    again = _explained(server, use_cache="keeper")["reason"]
    assert "tokens were still in memory" in again or "tokens were read from" in again


@pytest.mark.parametrize("last", [0, 1])
def test_of_caches_with_equal_texts_the_one_with_the_requests_tools_is_the_closest(
    start_server: StartServer, last: int
) -> None:
    server = start_server("--model", "toy=toy:template=tools")
    tools = [
        [{"type": "function", "function": {"name": name, "description": "x" * 90}}]
        for name in ("look", "hear")
    ]
    messages = [{"role": "system", "content": PROMPT}]
    for number in (1 - last, last):
        body = {"cache_name": f"tools-{number}", "messages": messages, "tools": tools[number]}
        assert server.post("/v1/cache/toy", **body).status_code == 200
    for number in (0, 1):
        told = _explained(server, system=PROMPT, tools=tools[number])
        assert told["closest_cache"] == f"tools-{number}"
        assert told["first_difference"] is None
    changed = [{"type": "function", "function": {"name": "look", "description": "x" * 80 + "y"}}]
    told = _explained(server, system=PROMPT, tools=changed)
    assert told["closest_cache"] == "tools-0"
    assert _diverging(told)[1:] == ("y", "x")


def test_a_key_is_told_of_public_caches_and_of_none_of_other_keys(
    start_server: StartServer, tmp_path: Path
) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text(
        'models = {toy = "toy:"}\nautomatic = false\n'
        '[keys.one]\nkey = "the-key-of-one-00001"\n[keys.two]\nkey = "the-key-of-two-00002"\n'
        f'[caches.public]\nmodel = "toy"\nprompt = "{PROMPT}"\n'
    )
    server = start_server("--config", str(config))
    own = PROMPT + "Then you sleep. " * 8
    body = {"cache_name": "own", "prompt": own}
    headers = {"authorization": "Bearer the-key-of-one-00001"}
    assert server.http.post("/v1/cache/toy", json=body, headers=headers).status_code == 200
    told = []
    for key in ("the-key-of-one-00001", "the-key-of-two-00002"):
        server.http.headers["authorization"] = f"Bearer {key}"
        eventually(lambda: server.http.get("/health").json()["caches_building"] == 0)
        told.append(_explained(server, system=own)["closest_cache"])
    assert told == ["own", "public"]


@pytest.mark.real_model
def test_the_real_models_control_tokens_are_written_by_their_names(real: RunningServer) -> None:
    real.create("explained", PROMPT, model="smollm2")
    told = _explained(real, system=PROMPT.replace("You", "They", 1), model="smollm2", max_tokens=1)
    assert told["closest_cache"] == "explained"
    assert told["text_before"] == "<|im_start|>system\n"
    assert (told["cache_text"][:9], told["prompt_text"][:9]) == ("You keep ", "They keep")
    assert _diverging(told)[1:] == ("They", "You")
