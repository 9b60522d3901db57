"""Several answers to one prompt, and what is told and asked of their tokens, in the engine."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from conftest import beside_smollm2
from driver import GREEDY, OTHER, PROMPT, Driver, small_model
from headstart.engine.model import Model
from headstart.protocol import Cancel, Failed, Sampling, Token
from headstart.toyspec import EOS


@pytest.fixture(params=["pool", "streams", "whole"])
def toy(request: pytest.FixtureRequest) -> Driver:
    """With a pool, without one, and where states can't be cut."""
    path = "toy:eos=0,can_cut=0" if request.param == "whole" else "toy:eos=0"
    return Driver(small_model(path), share_from=0 if request.param == "streams" else 32)


def _sampling(seed: int) -> Sampling:
    return Sampling(temperature=1, seed=seed)


def _answers(driver: Driver, first: int, n: int) -> list[list[int]]:
    driver.finish()
    return [driver.tokens(answer) for answer in range(first, first + n)]


def test_each_answer_is_the_one_that_its_seed_gives_alone(toy: Driver) -> None:
    alone = [toy.run(PROMPT, sampling=_sampling(5 + i), boundary=70)[0] for i in range(3)]
    toy.evict()
    first = toy.submit(PROMPT, sampling=_sampling(5), boundary=70, n=3)
    assert _answers(toy, first, 3) == alone
    assert len({tuple(answer) for answer in alone}) == 3


@pytest.mark.parametrize("boundary", [0, 70])
@beside_smollm2
def test_the_prompt_is_evaluated_once_for_all_answers(driver: Driver, boundary: int) -> None:
    driver.evict()
    first = driver.submit(PROMPT, boundary=boundary, n=3)
    answers = _answers(driver, first, 3)
    assert answers[0] == answers[1] == answers[2]
    stats = [driver.end(first + i).stats for i in range(3)]
    assert [each.evaluated_tokens for each in stats] == [100, 0, 0]
    assert [each.cached_tokens for each in stats] == [0, 100, 100]


def test_answers_use_the_same_cells_for_their_prompt(driver: Driver) -> None:
    driver.evict()
    driver.submit(PROMPT, n=3)
    while len(driver.engine.scheduler.running) < 3:
        driver.step()
    pool = driver.engine.scheduler.pool
    assert pool
    assert pool.prefix == PROMPT
    assert sum(slot.sequence is not None for slot in pool.slots) == 3
    driver.step()
    assert pool.cells - pool.free == len(PROMPT) + 3
    driver.finish()


def test_answers_join_others_that_are_in_the_pool_already(driver: Driver, tmp_path: Path) -> None:
    state = driver.save(PROMPT[:70], tmp_path / "state")
    alone, _ = driver.run(PROMPT, boundary=70, reuse=False)
    driver.evict()
    one = driver.submit(PROMPT, boundary=70, restore=state)
    several = driver.submit(PROMPT, boundary=70, restore=state, n=2)
    assert _answers(driver, several, 2) == [alone, alone]
    assert driver.tokens(one) == alone
    assert driver.end(several).stats.cached_tokens == 70


def test_a_later_request_computes_the_same_after_several_answers(driver: Driver) -> None:
    """What they left in the pool was cut where their own opening ended, not this request's."""
    longer = [*PROMPT, *OTHER[:20]]
    cold, _ = driver.run(longer, boundary=100, reuse=False)
    driver.submit(PROMPT, boundary=70, n=3)
    driver.finish()
    requests = [driver.submit(longer, boundary=100) for _ in range(2)]
    driver.finish()
    assert [driver.tokens(request) for request in requests] == [cold, cold]


def test_a_request_waits_until_there_is_a_slot_for_each_answer(toy: Driver) -> None:
    running = toy.submit(OTHER, 12)
    toy.step()
    first = toy.submit(PROMPT, 4, n=3)
    behind = toy.submit(OTHER[:30], 4)
    while toy.engine.scheduler.find(running):
        toy.step()
        assert toy.events[first] == toy.events[behind] == []
    toy.finish()
    assert all(len(toy.tokens(answer)) == 4 for answer in (first, first + 1, first + 2, behind))


def test_leaving_during_prefill_ends_all_answers(toy: Driver) -> None:
    first = toy.submit(PROMPT, n=3)
    toy.step()
    toy.engine.handle(Cancel(first + 1))
    toy.step()
    assert not toy.engine.busy
    assert [toy.end(first + i).reason for i in range(3)] == ["cancelled"] * 3


def test_one_answer_may_end_before_the_others(toy: Driver) -> None:
    whole, _ = toy.run(PROMPT)
    first = toy.submit(PROMPT, n=3)
    while not toy.tokens(first + 1):
        toy.step()
    toy.engine.handle(Cancel(first + 1))
    toy.finish()
    assert [toy.end(first + i).reason for i in range(3)] == ["length", "cancelled", "length"]
    assert toy.tokens(first) == toy.tokens(first + 2) == whole


def test_no_tokens_wanted_ends_all_answers(toy: Driver) -> None:
    first = toy.submit(PROMPT, 0, n=3)
    toy.finish()
    assert [toy.end(first + i).reason for i in range(3)] == ["length"] * 3


def test_a_state_that_can_not_be_copied_fails_its_answer_only(
    toy: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, _ = toy.run(PROMPT)
    first = toy.submit(PROMPT, n=3)
    copy = toy.model.copy
    # Into the pool and from it to the first answer's seat, where there is one, then for the second answer.
    pooled = toy.engine.scheduler.pool is not None
    works = iter([True, True, False, True] if pooled else [False, True])
    monkeypatch.setattr(toy.model, "copy", lambda *args: next(works) and copy(*args))
    toy.finish()
    assert isinstance(toy.events[first + 1][-1], Failed)
    assert toy.tokens(first) == toy.tokens(first + 2) == alone


def _told(driver: Driver, **sampling: object) -> list[Token]:
    request = driver.submit(PROMPT, 6, sampling=Sampling(**sampling))  # type: ignore[arg-type]
    driver.finish()
    return [event for event in driver.events[request] if isinstance(event, Token)]


def test_logprobs_are_told_only_when_asked_for(driver: Driver) -> None:
    assert {(event.logprob, len(event.top)) for event in _told(driver, temperature=0)} == {(None, 0)}


def test_the_likeliest_tokens_are_told_in_their_order(driver: Driver) -> None:
    for event in _told(driver, temperature=0, logprobs=5):
        values = [value for _, value in event.top]
        assert values == sorted(values, reverse=True)
        assert len({token for token, _ in event.top}) == 5
        assert event.top[0] == (event.token, event.logprob)
        assert 0 < sum(math.exp(value) for value in values) <= 1 + 1e-6


def test_asking_for_logprobs_changes_no_token(driver: Driver) -> None:
    plain = _told(driver, temperature=0.9, seed=3)
    asked = _told(driver, temperature=0.9, seed=3, logprobs=2)
    assert [event.token for event in plain] == [event.token for event in asked]
    assert all(event.logprob is not None and event.logprob < 0 for event in asked)


def test_a_forbidden_token_does_not_come_and_a_wanted_one_does(driver: Driver) -> None:
    plain = [event.token for event in _told(driver, temperature=0)]
    without = _told(driver, temperature=0, logit_bias=dict.fromkeys(plain, -100.0))
    assert not {event.token for event in without} & set(plain)
    assert [e.token for e in _told(driver, temperature=0, logit_bias={77: 100.0})] == [77] * 6


def test_a_bias_leaves_logprobs_as_they_are(driver: Driver) -> None:
    plain = _told(driver, temperature=0, logprobs=3)
    biased = _told(driver, temperature=0, logprobs=3, logit_bias={77: 100.0})
    assert biased[0].top == plain[0].top
    assert biased[0].logprob == pytest.approx(biased[0].logprob)
    assert biased[0].logprob != plain[0].logprob


def test_an_answer_that_ignores_its_end_goes_on_to_the_limit() -> None:
    driver = Driver(small_model("toy:"))
    ended, end = driver.run(PROMPT[:40], 200)
    assert end.reason == "stop"
    assert len(ended) < 200
    longer, end = driver.run(PROMPT[:40], 200, sampling=Sampling(temperature=0, ignore_eos=True))
    assert (end.reason, len(longer)) == ("length", 200)
    assert longer[: len(ended)] == ended
    assert EOS not in longer


@pytest.mark.real_model
def test_the_real_model_ignores_its_end_too(smollm2: Model) -> None:
    driver = Driver(smollm2)
    # After this the model says that it has ended, sooner or later.
    ended, end = driver.run(PROMPT, 60, sampling=Sampling(temperature=0, logit_bias={2: 100.0}))
    assert (ended, end.reason) == ([], "stop")
    biased = Sampling(temperature=0, logit_bias={2: 100.0}, ignore_eos=True)
    longer, end = driver.run(PROMPT, 60, sampling=biased)
    assert (end.reason, len(longer)) == ("length", 60)
    assert driver.run(PROMPT, 60, sampling=GREEDY)[0][:1] == longer[:1]
