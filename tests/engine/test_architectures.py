"""Caches work and hit whatever a model remembers by, and no state is cut that can't be.

The models are tiny, with random weights: what they say means nothing, but it depends on all they have read.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest

import tiny_models
from conftest import StartServer
from headstart.prompt.tokenizer import load_tokenizer
from servers import ONE_THREAD, WITHOUT_STORE, Json, RunningServer, running_server, said

pytestmark = pytest.mark.real_model

HARBOUR = "You are the clerk of a small harbour. " + " ".join(
    f"Rule {n}: the {who} has to {what} before the {when}."
    for n, (who, what, when) in enumerate(
        zip(
            ["captain", "pilot", "cook", "guard", "diver"] * 4,
            ["sign the list", "count the ropes", "carry the lamp", "clean the deck"] * 5,
            ["tide", "fog", "market", "storm", "night", "spring", "feast"] * 3,
            strict=False,
        )
    )
)
LIBRARY = "You keep the books of an old library. " + "Nobody may take a book home without your word. " * 12
QUESTIONS = [
    "Who carries the lamp?",
    "What happens at night?",
    "When do we leave here?",
    "Is the cook about?",
]
NEW_TEXT = " The clerk read the first rule and said:"
COLD: Json = {"cache_prompt": False}


@dataclass
class Tiny:
    """A server of one kind of model with two caches."""

    kind: str
    server: RunningServer

    def chat(self, question: str = QUESTIONS[0], **more: Any) -> Json:
        return self.server.chat(question, model="tiny", **more)

    def complete(self, prompt: str, **more: Any) -> Json:
        body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 24, **more}
        response = self.server.post("/v1/completions", **body)
        assert response.status_code == 200, response.text
        return response.json()

    @property
    def can_cut(self) -> bool:
        return self.kind == "full"


def check_hit(answer: Json, name: str = "harbour") -> None:
    usage, timings = answer["usage"], answer["timings"]
    assert (usage["cache_hit"], usage.get("cache_miss_reason")) == (True, None)
    assert usage["cached_prompts"] == [name]
    assert timings["prompt_n"] == usage["prompt_tokens"] - timings["cache_n"]
    assert 0 < timings["prompt_n"] <= 48
    assert timings["cache_n"] > 3 * tiny_models.WINDOW


def n_cached(answer: Json) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {kind: tiny_models.written(directory / f"{kind}.gguf", kind) for kind in tiny_models.ARCHITECTURES}


@pytest.fixture(scope="module", params=list(tiny_models.ARCHITECTURES))
def tiny(
    request: pytest.FixtureRequest, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tiny]:
    directory = tmp_path_factory.mktemp(request.param) / "cache"
    with running_server(directory, *ONE_THREAD, "--model", f"tiny={files[request.param]}") as server:
        server.create("harbour", HARBOUR, model="tiny")
        server.create("library", LIBRARY, model="tiny")
        yield Tiny(request.param, server)


def test_a_chat_hits_and_says_what_it_says_without_a_cache(tiny: Tiny) -> None:
    cold = tiny.chat(system=HARBOUR, **COLD)
    assert n_cached(cold) == 0
    warm = tiny.chat(use_cache="harbour")
    check_hit(warm)
    assert said(warm) == said(cold)
    assert said(warm) != said(tiny.chat(use_cache="library"))


def test_a_completion_hits_and_says_what_it_says_without_a_cache(tiny: Tiny) -> None:
    cold = tiny.complete(HARBOUR + NEW_TEXT, **COLD)
    warm = tiny.complete(NEW_TEXT, use_cache="harbour")
    check_hit(warm)
    assert said(warm) == said(cold)
    assert said(warm) != said(tiny.complete(NEW_TEXT, use_cache="library"))


def test_after_a_restart_the_states_come_from_their_files(tiny: Tiny) -> None:
    chat = said(tiny.chat(system=HARBOUR, **COLD))
    text = said(tiny.complete(HARBOUR + NEW_TEXT, **COLD))
    tiny.server.restart()
    for answer, expected in (
        (tiny.chat(use_cache="harbour"), chat),
        (tiny.complete(NEW_TEXT, use_cache="harbour"), text),
    ):
        check_hit(answer)
        assert answer["timings"]["cache_source"] == "file"
        assert said(answer) == expected


def test_two_caches_that_take_turns_keep_their_own_texts(tiny: Tiny) -> None:
    prompts = {"harbour": HARBOUR, "library": LIBRARY}
    expected = {name: said(tiny.chat(system=prompt, **COLD)) for name, prompt in prompts.items()}
    for _ in range(5):
        for name in prompts:
            answer = tiny.chat(use_cache=name)
            check_hit(answer, name)
            assert said(answer) == expected[name]


def test_questions_after_the_same_cache_are_answered_as_alone_one_by_one_and_at_once(tiny: Tiny) -> None:
    expected = [said(tiny.chat(question, system=HARBOUR, **COLD)) for question in QUESTIONS]
    assert len(set(expected)) == len(QUESTIONS)
    answers = [tiny.chat(question, use_cache="harbour") for question in QUESTIONS]
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        for _ in range(3):
            together = list(pool.map(lambda question: tiny.chat(question, use_cache="harbour"), QUESTIONS))
            answers += together
    for i, answer in enumerate(answers):
        check_hit(answer)
        assert said(answer) == expected[i % len(QUESTIONS)]


def test_requests_at_once_that_share_nothing_do_not_disturb_each_other(tiny: Tiny) -> None:
    """Prompts of different lengths, some from caches, are computed while others generate."""

    def ask(i: int) -> str:
        n = i % 6
        if n < 2:
            return said(tiny.chat(QUESTIONS[n], use_cache=("harbour", "library")[n]))
        return said(tiny.chat(QUESTIONS[n - 2], system=(HARBOUR + LIBRARY)[150 * n : 350 * n]))

    expected = [ask(i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(18))) == 3 * expected


def test_a_conversation_goes_on_from_what_its_slot_holds_and_says_the_same(tiny: Tiny) -> None:
    opening = [{"role": "system", "content": LIBRARY[:300]}, {"role": "user", "content": QUESTIONS[1]}]
    first = _talk(tiny, opening)
    going_on = [
        *opening,
        {"role": "assistant", "content": said(first)},
        {"role": "user", "content": QUESTIONS[2]},
    ]
    second = _talk(tiny, going_on)
    # All but the last token of the answer, which nothing was computed from.
    assert n_cached(second) == first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"] - 1
    assert second["timings"]["cache_source"] == "slot"
    cold = _talk(tiny, going_on, **COLD)
    assert n_cached(cold) == 0
    assert said(second) == said(cold)


def _talk(tiny: Tiny, messages: list[Json], **more: Any) -> Json:
    body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 24, **more}
    response = tiny.server.post("/v1/chat/completions", **body)
    assert response.status_code == 200, response.text
    return response.json()


def test_what_shares_only_a_part_with_what_is_held_is_computed_anew(tiny: Tiny) -> None:
    """In the slots are the openings and more: none may be cut back to a shorter one."""
    tiny.server.restart()
    tiny.chat(system=HARBOUR)
    tiny.chat(use_cache="harbour")
    for length in (len(HARBOUR) // 2, len(HARBOUR) - 40):
        prompt = HARBOUR[:length]
        shorter = tiny.chat(system=prompt)
        assert tiny.can_cut or n_cached(shorter) == 0
        assert said(shorter) == said(tiny.chat(system=prompt, **COLD))
    forked = tiny.chat("Which rule is the third?", system=HARBOUR)
    # From a slot or not: that of the cache with the same opening may be used, whole.
    assert tiny.can_cut or forked["timings"]["cache_source"] == "file"
    assert said(forked) == said(tiny.chat("Which rule is the third?", system=HARBOUR, **COLD))


@pytest.mark.parametrize("kind", tiny_models.ARCHITECTURES)
def test_a_text_whose_tokens_differ_early_from_the_states_misses_or_is_cut(
    start_server: StartServer, files: dict[str, Path], kind: str
) -> None:
    """A word that the text completes is other tokens, and more of them than the last one of the prompt. The
    state store would have the whole prompt from the request without the cache."""
    tiny = Tiny(kind, start_server("--model", f"tiny={files[kind]}", env=WITHOUT_STORE))
    prompt, text = LIBRARY + "It is abou", "t the ship"
    encode = load_tokenizer(str(files[tiny.kind])).encode
    kept = len(encode(prompt)) - 1
    assert encode(prompt)[:kept] != encode(prompt + text)[:kept]
    tiny.server.create("seam", prompt, model="tiny", **{"for": ["completion"]})
    cold = tiny.complete(prompt + text, **COLD)
    answer = tiny.complete(text, use_cache="seam")
    usage = answer["usage"]
    assert said(answer) == said(cold)
    assert usage["cache_hit"] is tiny.can_cut
    if not tiny.can_cut:
        assert (usage["cache_miss_reason"], n_cached(answer)) == ("prompt_differs", 0)


@pytest.mark.parametrize("kind", tiny_models.ARCHITECTURES)
def test_a_state_fits_another_number_of_slots_or_is_built_again(
    start_server: StartServer, files: dict[str, Path], kind: str
) -> None:
    flags = ("--model", f"tiny={files[kind]}")
    before = Tiny(kind, start_server(*flags, "--slots", "3"))
    before.server.create("harbour", HARBOUR, model="tiny")
    expected = said(before.chat(system=HARBOUR, **COLD))
    before.server.stop()
    for slots in (1, 5):
        after = Tiny(kind, start_server(*flags, "--slots", str(slots)))
        answer = after.chat(use_cache="harbour")
        assert said(answer) == expected
        if kind == "hybrid-window":
            assert answer["usage"]["cache_miss_reason"] == "settings_changed"
            answer = after.chat(use_cache="harbour")
        check_hit(answer)
        assert answer["timings"]["cache_source"] in ("file", "slot")
        assert said(answer) == expected
        after.server.stop()


@pytest.mark.parametrize("kind", ["window", "hybrid", "recurrent"])
def test_measuring_and_converted_weights_work(start_server: StartServer, tmp_path: Path, kind: str) -> None:
    """Rows of 4 or 16 weights can't be Q8_0, and stay as they are."""
    path = tiny_models.written(tmp_path / "q4.gguf", kind, gguf.GGMLQuantizationType.Q4_1)
    flags = ("--model", f"tiny={path}")
    server = start_server(*flags, env={"HEADSTART_TUNE": "true"})
    measured = (server.cache_dir / "tuning.json").read_text()
    assert "weights q8_0" in measured
    server.stop()
    tiny = Tiny(kind, start_server(*flags, "--weights", "q8_0"))
    tiny.server.create("harbour", HARBOUR, model="tiny")
    cold = said(tiny.chat(system=HARBOUR, **COLD))
    for _ in range(2):
        warm = tiny.chat(use_cache="harbour")
        check_hit(warm)
        assert said(warm) == cold
        tiny.server.restart()


def test_weights_that_are_q8_0_already_are_what_they_are_asked_to_be(
    start_server: StartServer, tmp_path: Path
) -> None:
    path = tiny_models.written(tmp_path / "q8.gguf", "full", gguf.GGMLQuantizationType.Q8_0)
    flags = ("--model", f"tiny={path}", "--weights")
    server = start_server(*flags, "file")
    server.create("harbour", HARBOUR, model="tiny")
    server.stop()
    check_hit(Tiny("full", start_server(*flags, "q8_0")).chat(use_cache="harbour"))
