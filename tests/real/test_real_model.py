"""The server keeps its promises with SmolLM2 and a system prompt of some 500 tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import StartServer
from servers import ONE_THREAD, Json, RunningServer, events, running_server, said

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(600)]

WHO = (
    "The harbour master",
    "A pilot",
    "Every visitor",
    "The night guard",
    "A ferry captain",
    "The cook",
    "A diver",
)
DOES = (
    "signs",
    "reads aloud",
    "checks twice",
    "carries",
    "hands over",
    "copies",
    "files",
    "cleans",
    "counts",
)
WHAT = ("the weather log", "the blue lantern", "a list of passengers", "the fuel receipt", "the spare key")
WHEN = (
    "before sunrise",
    "at high tide",
    "when the fog bell rings",
    "after the last ferry",
    "on market days",
    "at noon",
)
WHY = ("the council asked for it", "ropes wear out", "an old ship was lost", "insurers insist")


def rules(n: int) -> str:
    """The system prompt with `n` rules."""
    text = " ".join(
        f"Rule {i}: {WHO[i % 7]} {DOES[i % 9]} {WHAT[i % 5]} {WHEN[i % 6]}, because {WHY[i % 4]}."
        for i in range(1, n + 1)
    )
    return (
        f"You are the clerk of a small harbour. These are its rules. {text} Answer visitors from these rules."
    )


SYSTEM = rules(22)
QUESTION = "Who carries the blue lantern, and at what time of the day does it happen here?"
NEW_TEXT = "\n\nThe clerk opened the book and read the first rule to the visitors:"
HARBOUR: Json = {"use_cache": "harbour"}
COLD: Json = {"cache_prompt": False}
LIMIT = 48


def text_of(event: Json) -> str:
    return "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in event["choices"])


def merged(chunks: list[Json]) -> Json:
    """What the chunks of a stream say in all, in the shape of a whole answer."""
    text = "".join(map(text_of, chunks))
    timings = next(chunk["timings"] for chunk in chunks if "timings" in chunk)
    return {"choices": [{"text": text}], "usage": chunks[-1]["usage"], "timings": timings}


class Clerk:
    """Asks `server` about the harbour, greedily."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server

    def body(self, *, system: str = "", question: str = QUESTION, **fields: Any) -> Json:
        opening = [{"role": "system", "content": system}] if system else []
        messages = [*opening, {"role": "user", "content": question}]
        return {"model": "smollm2", "messages": messages, "temperature": 0, "max_tokens": LIMIT, **fields}

    def ask(self, **fields: Any) -> Json:
        return self._post("/v1/chat/completions", self.body(**fields))

    def complete(self, prompt: str, **fields: Any) -> Json:
        body = {"model": "smollm2", "prompt": prompt, "temperature": 0, "max_tokens": LIMIT, **fields}
        return self._post("/v1/completions", body)

    def _post(self, path: str, body: Json) -> Json:
        if body.get("stream"):
            body |= {"stream_options": {"include_usage": True}}
            with self.server.http.stream("POST", path, json=body) as response:
                return merged(list(events(response)))
        response = self.server.http.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture(scope="module")
def clerk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clerk]:
    """A server with the cache `harbour`; tests restart it as they like."""
    with running_server(tmp_path_factory.mktemp("harbour") / "cache", *ONE_THREAD) as server:
        server.create("harbour", SYSTEM, model="smollm2")
        yield Clerk(server)


@pytest.fixture(scope="module")
def cold_chat(clerk: Clerk) -> Json:
    """The answer to the system message in full, every token computed."""
    answer = clerk.ask(system=SYSTEM, **COLD)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert 400 <= answer["usage"]["prompt_tokens"] <= 600
    assert said(answer)
    return answer


@pytest.fixture(scope="module")
def cold_text(clerk: Clerk) -> Json:
    answer = clerk.complete(SYSTEM + NEW_TEXT, **COLD)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert said(answer)
    return answer


def check_hit(answer: Json) -> None:
    """It started from the cache `harbour` and evaluated hardly more than what came after."""
    usage, timings = answer["usage"], answer["timings"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert usage["cache_hit"] is True
    assert usage["cached_prompts"] == ["harbour"]
    assert 0 < usage["prompt_tokens"] - cached <= 40
    assert (timings["cache_n"], timings["prompt_n"]) == (cached, usage["prompt_tokens"] - cached)


def check_from_file(answer: Json) -> None:
    check_hit(answer)
    assert answer["timings"]["restore_ms"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_from_the_cache_says_what_it_says_without(clerk: Clerk, cold_chat: Json, stream: bool) -> None:
    named = clerk.ask(stream=stream, **HARBOUR)
    check_hit(named)
    assert said(named) == said(cold_chat)
    assert named["usage"]["prompt_tokens"] == cold_chat["usage"]["prompt_tokens"]
    assert named["usage"]["completion_tokens"] == cold_chat["usage"]["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_from_the_cache_says_what_it_says_without(
    clerk: Clerk, cold_text: Json, stream: bool
) -> None:
    named = clerk.complete(NEW_TEXT, stream=stream, **HARBOUR)
    check_hit(named)
    assert said(named) == said(cold_text)
    assert named["usage"]["prompt_tokens"] == cold_text["usage"]["prompt_tokens"]


def test_a_stream_without_a_cache_says_the_same(clerk: Clerk, cold_chat: Json) -> None:
    assert said(clerk.ask(system=SYSTEM, stream=True, **COLD)) == said(cold_chat)


def test_the_system_message_in_full_with_the_cache_of_it_is_not_doubled(
    clerk: Clerk, cold_chat: Json
) -> None:
    named = clerk.ask(system=SYSTEM, **HARBOUR)
    check_hit(named)
    assert said(named) == said(cold_chat)


def test_a_cache_named_but_not_to_be_used_is_a_miss_with_the_same_text(clerk: Clerk, cold_chat: Json) -> None:
    named = clerk.ask(**HARBOUR, **COLD)
    assert named["usage"]["cache_hit"] is False
    assert named["usage"]["cached_prompts"] == []
    assert named["usage"]["cache_miss_reason"] == "cache_prompt_false"
    assert named["timings"]["prompt_n"] == named["usage"]["prompt_tokens"]
    assert said(named) == said(cold_chat)


@pytest.mark.parametrize("stream", [False, True])
def test_after_a_restart_the_state_comes_from_its_file_and_the_text_is_the_same(
    clerk: Clerk, cold_chat: Json, cold_text: Json, stream: bool
) -> None:
    clerk.server.restart()
    chat = clerk.ask(stream=stream, **HARBOUR)
    check_from_file(chat)
    assert said(chat) == said(cold_chat)
    text = clerk.complete(NEW_TEXT, stream=stream, **HARBOUR)
    check_from_file(text)
    assert said(text) == said(cold_text)


def test_before_the_first_text_less_than_a_tenth_of_the_prompt_is_evaluated_also_after_a_restart(
    clerk: Clerk,
) -> None:
    """The time to the first text follows from this; bench/first_token.py measures it."""
    for _ in range(2):
        answer = clerk.ask(stream=True, **HARBOUR)
        assert answer["timings"]["prompt_n"] * 10 < answer["usage"]["prompt_tokens"]
        clerk.server.restart()


def test_two_caches_that_take_turns_in_one_slot_keep_their_own_texts(start_server: StartServer) -> None:
    server = start_server("--slots", "1")
    prompts = {
        "pirate": "You are a pirate and speak of nothing but the sea and gold. " * 9,
        "monk": "You are a monk in the mountains and praise silence and bread. " * 9,
    }
    clerk = Clerk(server)
    expected = {}
    for name, prompt in prompts.items():
        server.create(name, prompt, model="smollm2", **{"for": ["chat"]})
        expected[name] = said(clerk.ask(system=prompt, **COLD))
    assert expected["pirate"] != expected["monk"]
    for _ in range(3):
        for name in prompts:
            answer = clerk.ask(use_cache=name)
            assert answer["usage"]["cache_hit"] is True
            assert answer["usage"]["cached_prompts"] == [name]
            assert answer["timings"]["restore_ms"] > 0
            assert said(answer) == expected[name]


QUESTIONS = [
    QUESTION,
    "What happens at noon?",
    "Who signs the list of passengers?",
    "When do ropes wear out?",
]


def ask_all(clerk: Clerk) -> tuple[list[str], list[str]]:
    """What is said to each question alone, and to all of them at the same time; all of them hit."""
    alone = [said(clerk.ask(question=question, **HARBOUR)) for question in QUESTIONS]
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        answers = list(pool.map(lambda question: clerk.ask(question=question, **HARBOUR), QUESTIONS))
    for answer in answers:
        check_hit(answer)
    return alone, [said(answer) for answer in answers]


def test_requests_at_the_same_time_over_one_cache_each_hit_and_say_their_own(clerk: Clerk) -> None:
    alone, together = ask_all(clerk)
    # Beside others the last bits may differ, and with them a word further on where two are equally likely.
    assert [text[:12] for text in together] == [text[:12] for text in alone]
    assert len(set(together)) == len(QUESTIONS)


def test_requests_at_the_same_time_that_share_nothing_say_exactly_what_they_say_alone(tmp_path: Path) -> None:
    with running_server(tmp_path / "cache", *ONE_THREAD, env={"HEADSTART_SHARE_FROM": "0"}) as server:
        # After a shorter prompt some of the answers have tokens that are about equally likely.
        server.create("harbour", rules(48), model="smollm2", **{"for": ["chat"]})
        alone, together = ask_all(Clerk(server))
    assert together == alone


def is_healthy(server: RunningServer) -> bool:
    return server.http.get("/ready").status_code == 200


def test_a_worker_killed_in_mid_stream_is_replaced_and_the_cache_hits_from_its_file(
    clerk: Clerk, cold_chat: Json
) -> None:
    server = clerk.server
    body = clerk.body(stream=True, **(HARBOUR | {"max_tokens": None}))
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        chunks = events(response)
        next(chunk for chunk in chunks if text_of(chunk))
        server.workers()[0].kill()
        *_, last = chunks
    assert last.keys() == {"error"}
    assert last["error"]["code"] == "engine_died"
    assert last["error"]["type"] == "server_error"
    deadline = time.monotonic() + 60
    while not is_healthy(server):
        assert time.monotonic() < deadline, "the worker was not replaced"
        time.sleep(0.05)
    again = clerk.ask(**HARBOUR)
    check_from_file(again)
    assert said(again) == said(cold_chat)


# As Gemma's does: the system text opens the first user turn.
FOLDING = """{% set turns = messages %}{% set opening = '' %}
{%- if messages[0]['role'] == 'system' %}
{%- set opening = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}{% endif %}
{%- for message in turns %}{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if loop.first %}{{ opening }}{% endif %}{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}
{{- '<|im_start|>assistant\\n' }}"""


def test_a_template_that_folds_the_system_text_into_the_users_turn_keeps_every_promise(
    start_server: StartServer, tmp_path: Path
) -> None:
    template = tmp_path / "folding.jinja"
    template.write_text(FOLDING)
    env = {"HEADSTART_TEMPLATES": json.dumps({"smollm2": str(template)})}
    server = start_server("--slots", "1", env=env)
    clerk = Clerk(server)
    opening = SYSTEM[:800]
    cold = clerk.ask(system=opening, **COLD)
    server.create("harbour", opening, model="smollm2")
    server.restart()
    warm = clerk.ask(**HARBOUR)
    streamed = clerk.ask(stream=True, **HARBOUR)
    for answer in (warm, streamed):
        assert answer["usage"]["cache_hit"] is True
        assert answer["usage"]["prompt_tokens"] == cold["usage"]["prompt_tokens"]
        assert (
            answer["timings"]["prompt_n"] == answer["usage"]["prompt_tokens"] - answer["timings"]["cache_n"]
        )
        assert answer["timings"]["prompt_n"] <= 40
    assert warm["timings"]["cache_source"] == "file"
    assert said(cold) == said(warm) == said(streamed)
