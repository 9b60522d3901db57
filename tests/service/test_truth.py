"""Hits are true: what is reported is what the engine evaluated, and no state changes an answer."""

from __future__ import annotations

import json
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import StartServer
from servers import ONE_THREAD, RunningServer, events, said

PROMPT = "You keep the lighthouse.\n\nEach evening you light the lamp, and " + " and ".join(
    f"watch ship number {i}" for i in range(60)
)
TEMPLATES = ["chatml", "fold", "nosystem"]


def _usage(answer: dict[str, Any]) -> tuple[bool, str | None]:
    return answer["usage"]["cache_hit"], answer["usage"].get("cache_miss_reason")


def _check_counts(answer: dict[str, Any]) -> None:
    usage, timings = answer["usage"], answer["timings"]
    assert timings["cache_n"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert timings["prompt_n"] == usage["prompt_tokens"] - timings["cache_n"]


def _streamed(server: RunningServer, path: str, **body: Any) -> tuple[str, dict[str, Any]]:
    """The text of a stream, and its last chunk's usage."""
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with server.http.stream("POST", path, json=body) as response:
        chunks = list(events(response))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)
    return text, chunks[-1]["usage"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_gets_the_same_text_with_the_cache_without_it_after_a_restart_and_streamed(
    start_server: StartServer, template: str
) -> None:
    server = start_server("--model", f"toy=toy:template={template}")
    cold = server.chat("What is out there?", system=PROMPT, cache_prompt=False)
    server.create("keeper", PROMPT)
    warm = server.chat("What is out there?", use_cache="keeper")
    assert _usage(warm) == (True, None)
    assert warm["usage"]["cached_prompts"] == ["keeper"]
    server.restart()
    restarted = server.chat("What is out there?", use_cache="keeper")
    assert _usage(restarted) == (True, None)
    body = {"model": "toy", "temperature": 0, "max_tokens": 24, "use_cache": "keeper"}
    question = [{"role": "user", "content": "What is out there?"}]
    streamed, usage = _streamed(server, "/v1/chat/completions", messages=question, **body)
    assert usage["cache_hit"] is True
    assert said(cold) == said(warm) == said(restarted) == streamed
    for answer in (cold, warm, restarted):
        _check_counts(answer)
        assert answer["usage"]["prompt_tokens"] == cold["usage"]["prompt_tokens"]
    assert warm["timings"]["prompt_n"] < 40 < warm["timings"]["cache_n"]


@pytest.mark.parametrize("text", ["def light(lamp):", "ing", "", " and more"])
def test_a_completion_gets_the_same_text_with_the_cache_and_without_it(
    start_server: StartServer, text: str
) -> None:
    server = start_server("--model", "toy=toy:")
    prompt = PROMPT + "\n"  # merges with "def"
    body = {"model": "toy", "temperature": 0, "max_tokens": 24}
    cold = server.post("/v1/completions", prompt=prompt + text, cache_prompt=False, **body).json()
    server.create("keeper", prompt)
    server.restart()
    warm = server.post("/v1/completions", prompt=text, use_cache="keeper", **body).json()
    streamed, _ = _streamed(server, "/v1/completions", prompt=text, use_cache="keeper", **body)
    assert said(cold) == said(warm) == streamed
    assert _usage(warm) == (True, None)
    _check_counts(warm)


def test_a_system_message_equal_to_the_cached_one_is_not_repeated(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    plain = server.chat("Who is there?", use_cache="keeper")
    repeated = server.chat("Who is there?", use_cache="keeper", system=PROMPT)
    assert said(plain) == said(repeated)
    assert plain["usage"]["prompt_tokens"] == repeated["usage"]["prompt_tokens"]


def test_another_system_message_follows_the_cached_one(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    messages = [
        {"role": "system", "content": PROMPT},
        {"role": "system", "content": "Speak in rhymes."},
        {"role": "user", "content": "Who is there?"},
    ]
    body = {"model": "toy", "temperature": 0, "max_tokens": 24}
    whole = server.post("/v1/chat/completions", messages=messages, cache_prompt=False, **body).json()
    cached = server.post("/v1/chat/completions", messages=messages[1:], use_cache="keeper", **body).json()
    assert said(whole) == said(cached)
    assert _usage(cached) == (True, None)
    _check_counts(cached)


def test_hits_are_counted_whether_streamed_or_not(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    server.chat("One?", use_cache="keeper")
    assert server.http.get("/v1/cache/toy/keeper").json()["hits"] == 1
    question = [{"role": "user", "content": "Two?"}]
    _streamed(
        server, "/v1/chat/completions", model="toy", messages=question, use_cache="keeper", max_tokens=3
    )
    server.restart()
    assert server.http.get("/v1/cache/toy/keeper").json()["hits"] == 2


def test_without_a_name_nothing_is_named_and_reuse_is_told(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    first = server.chat("One?", system=PROMPT)
    second = server.chat("Two?", system=PROMPT)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 400
    forced = server.chat("Two?", system=PROMPT, cache_prompt=False)
    for answer in (first, second, forced):
        assert not answer["usage"].keys() & {"cache_hit", "cached_prompts", "cache_miss_reason"}
    assert forced["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_conversation_is_not_prefilled_again(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:eos=0")
    server.create("keeper", PROMPT)
    first = server.chat("One?", use_cache="keeper")
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": said(first)},
        {"role": "user", "content": "Two?"},
    ]
    second = server.post(
        "/v1/chat/completions", model="toy", messages=turns, use_cache="keeper", max_tokens=4
    ).json()
    assert _usage(second) == (True, None)
    assert second["timings"]["cache_n"] > first["usage"]["prompt_tokens"]


CHANGES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "model_changed": (("--model", "toy=toy:weights=other"), {}),
    "template_changed": (("--model", "toy=toy:template=fold"), {}),
    "settings_changed": (("--model", "toy=toy:"), {"HEADSTART_FLASH_ATTENTION": "true"}),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_state_of_another_time_is_not_used_but_built_again(
    start_server: StartServer, tmp_path: Path, reason: str
) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    server.stop()
    flags, env = CHANGES[reason]
    server = start_server(*flags, env=env)
    cold = server.chat("Who is there?", system=PROMPT, cache_prompt=False)
    first = server.chat("Who is there?", use_cache="keeper")
    second = server.chat("Who is there?", use_cache="keeper")
    assert _usage(first) == (False, reason)
    assert first["usage"]["cached_prompts"] == []
    assert _usage(second) == (True, None)
    assert said(cold) == said(first) == said(second)


def test_damage_at_any_place_never_changes_an_answer(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:", "--slots", "1")
    server.create("keeper", PROMPT)
    server.create("other", "Something else to fill the slot with. " * 10)
    path = server.cache_dir / "toy" / "keeper.headstart"
    whole = path.read_bytes()
    expected = said(server.chat("Who is there?", use_cache="keeper"))
    rng = random.Random(2)
    for round_ in range(40):
        damaged = bytearray(path.read_bytes())
        if round_ % 4 == 3:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        first = server.chat("Who is there?", use_cache="keeper")
        assert _usage(first) == (False, "corrupt")
        second = server.chat("Who is there?", use_cache="keeper")
        assert _usage(second) == (True, None)
        server.chat("x", use_cache="other")
        third = server.chat("Who is there?", use_cache="keeper")
        assert _usage(third) == (True, None)
        assert said(first) == said(second) == said(third) == expected
    assert len(path.read_bytes()) == len(whole)
    assert server.files() == ["toy/keeper.headstart", "toy/other.headstart"]


def test_damage_that_happened_while_the_server_was_down_is_healed(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    expected = said(server.chat("Who is there?", use_cache="keeper"))
    server.stop()
    path = server.cache_dir / "toy" / "keeper.headstart"
    path.write_bytes(path.read_bytes()[:-10])
    server.start()
    first = server.chat("Who is there?", use_cache="keeper")
    assert _usage(first) == (False, "corrupt")
    assert said(first) == expected
    assert _usage(server.chat("Who is there?", use_cache="keeper")) == (True, None)


def test_a_cache_for_one_endpoint_is_built_for_the_other_by_creating_it_again(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "toy=toy:")
    body = {"cache_name": "keeper", "prompt": PROMPT, "for": ["chat"]}
    created = server.post("/v1/cache/toy", **body).json()
    assert list(created["forms"]) == ["chat"]
    question = {"model": "toy", "prompt": "def x", "use_cache": "keeper", "temperature": 0}
    missed = server.post("/v1/completions", **question).json()
    assert _usage(missed) == (False, "form_not_built")
    updated = server.create("keeper", PROMPT)
    assert (updated["object"], updated["version"]) == ("cache.updated", 2)
    hit = server.post("/v1/completions", **question).json()
    assert _usage(hit) == (True, None)
    assert said(hit) == said(missed)


def test_creating_the_same_cache_again_computes_nothing(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=1")
    server.create("keeper", PROMPT)
    server.restart()
    updated = server.create("keeper", PROMPT)
    assert updated["object"] == "cache.updated"
    shown = server.http.get("/v1/cache/toy/keeper").json()
    assert (shown["build_ms"], shown["version"]) == (0, 2)
    assert _usage(server.chat("Who?", use_cache="keeper")) == (True, None)


def test_replacing_a_cache_changes_what_it_answers(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    before = server.chat("Who?", use_cache="keeper")
    server.create("keeper", "You are the ship. " * 12)
    after = server.chat("Who?", use_cache="keeper")
    assert _usage(after) == (True, None)
    assert said(after) == said(server.chat("Who?", system="You are the ship. " * 12, cache_prompt=False))
    assert said(after) != said(before)


def test_a_model_that_can_not_cut_its_state_hits_as_well(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:can_cut=0")
    cold = server.chat("Who is there?", system=PROMPT, cache_prompt=False)
    server.create("keeper", PROMPT)
    server.restart()
    for _ in range(2):
        warm = server.chat("Who is there?", use_cache="keeper")
        assert _usage(warm) == (True, None)
        assert said(warm) == said(cold)


def test_a_directory_can_be_copied_to_another_place(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    expected = said(server.chat("Who?", use_cache="keeper"))
    server.stop()
    shutil.copytree(server.cache_dir, tmp_path / "copy")
    moved = start_server("--model", "toy=toy:", cache_dir=tmp_path / "copy")
    answer = moved.chat("Who?", use_cache="keeper")
    assert _usage(answer) == (True, None)
    assert said(answer) == expected


def test_requests_during_replacements_each_answer_for_one_version_or_the_other(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "toy=toy:")
    prompts = [PROMPT, "You are the ship. " * 12]
    expected = {said(server.chat("Who?", system=prompt, cache_prompt=False)) for prompt in prompts}
    server.create("keeper", prompts[0])
    stop = threading.Event()

    def replace() -> None:
        with httpx.Client(base_url=server.url) as http:
            for i in range(60):
                if stop.is_set():
                    return
                body = {"cache_name": "keeper", "prompt": prompts[(i + 1) % 2]}
                http.post("/v1/cache/toy", json=body).raise_for_status()

    replacing = threading.Thread(target=replace)
    replacing.start()
    try:
        answers = [server.chat("Who?", use_cache="keeper") for _ in range(60)]
    finally:
        stop.set()
        replacing.join()
    assert {said(answer) for answer in answers} <= expected
    for answer in answers:
        _check_counts(answer)
    last = server.http.get("/v1/cache/toy/keeper").json()
    final = server.chat("Who?", use_cache="keeper")
    assert said(final) == said(server.chat("Who?", system=last["prompt"], cache_prompt=False))
    assert server.files() == ["toy/keeper.headstart"]


# As in Mistral's models: the last user message has the system text before it.
LATE_SYSTEM = (
    "{% set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for message in messages if message['role'] != 'system' %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if loop.last and message['role'] == 'user' %}{{ system }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _late_system(tmp_path: Path, model: str) -> dict[str, str]:
    """The environment in which the model has this template."""
    path = tmp_path / "late.jinja"
    path.write_text(LATE_SYSTEM)
    return {"HEADSTART_TEMPLATES": json.dumps({model: str(path)})}


def _check_half(server: RunningServer, model: str) -> None:
    """A cache that the template writes at the beginning is a hit. One that it moves behind other messages is
    none, though its first tokens are those of the prompt; neither is one of which less than half is used."""
    server.create("moved", PROMPT, model=model)
    hit = server.chat("One?", model=model, use_cache="moved", explain_cache=True)
    assert _usage(hit) == (True, None)
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": said(hit)},
        {"role": "user", "content": "Two?"},
    ]
    body = {"model": model, "temperature": 0, "max_tokens": 8, "explain_cache": True}
    moved = server.post("/v1/chat/completions", messages=turns, use_cache="moved", **body).json()
    assert _usage(moved) == (False, "prompt_differs")
    assert moved["usage"]["cached_prompts"] == []
    told = moved["cache_explanation"]
    assert 0 < told["matched_tokens"] < told["cache_tokens"] // 2
    assert "was not used" in told["reason"]
    system = {"role": "system", "content": PROMPT}
    cold = server.post("/v1/chat/completions", messages=[system, *turns], cache_prompt=False, **body).json()
    assert said(moved) == said(cold)


def test_less_than_half_of_a_named_cache_is_no_hit(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server("--model", "toy=toy:", env=_late_system(tmp_path, "toy"))
    _check_half(server, "toy")


@pytest.mark.parametrize(("n_same", "is_hit"), [(600, True), (200, False)])
def test_from_half_of_a_named_cache_on_it_is_a_hit(
    start_server: StartServer, tmp_path: Path, n_same: int, is_hit: bool
) -> None:
    # The second message of a chat is written into the system text.
    source = (
        "{{ '<|im_start|>system\n' }}{% if messages | length > 2 %}{{ messages[0]['content'][:"
        + str(n_same)
        + "] }}"
        "{% else %}{{ messages[0]['content'] }}{% endif %}{{ '<|im_end|>\n' }}"
        "{% for message in messages[1:] %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
        "{{ '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
    )
    path = tmp_path / "short.jinja"
    path.write_text(source)
    server = start_server("--model", "toy=toy:", env={"HEADSTART_TEMPLATES": json.dumps({"toy": str(path)})})
    letter = "".join(f"Line {i} of the letter. " for i in range(40))[:800]
    tokens = server.create("letter", letter)["forms"]["chat"]["tokens"]
    server.restart()
    turns = [{"role": "user", "content": text} for text in ("One?", "Two?")]
    body = {"model": "toy", "temperature": 0, "max_tokens": 8}
    answer = server.post("/v1/chat/completions", messages=turns, use_cache="letter", **body).json()
    assert _usage(answer) == ((True, None) if is_hit else (False, "prompt_differs"))
    # Either way the tokens in common are reused, on a miss up to where their prefill was cut.
    cached = answer["timings"]["cache_n"]
    assert (cached >= tokens / 2) == is_hit
    assert cached >= 64
    assert answer["timings"]["cache_source"] == "file"
    assert answer["timings"]["prefix_match_n"] >= cached


@pytest.mark.real_model
def test_less_than_half_of_a_real_models_cache_is_no_hit(start_server: StartServer, tmp_path: Path) -> None:
    _check_half(start_server(*ONE_THREAD, env=_late_system(tmp_path, "smollm2")), "smollm2")
