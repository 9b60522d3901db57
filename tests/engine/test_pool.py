"""Sequences that begin alike share what they have in common, and get the answers they get alone."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from driver import CHUNK, OTHER, PROMPT, Driver, small_model
from headstart.engine.core.chunking import Chunking
from headstart.engine.model import Model
from headstart.model_files import embedded_model
from headstart.protocol import Cancel, StateRef

PREFIX = PROMPT[:70]
QUESTIONS = [[30 + i, 31, 32 + i, 33] for i in range(3)]


@pytest.fixture
def toy() -> Driver:
    return Driver(small_model("toy:eos=0"))


def _pooled(driver: Driver) -> list[int]:
    return [s.request.id for s in driver.engine.scheduler.running if s.slot and s.slot.pooled]


def _ask(driver: Driver, state: StateRef | None, n: int = 8) -> list[int]:
    """All questions at once."""
    return [driver.submit(PREFIX + new, n, boundary=70, restore=state) for new in QUESTIONS]


def _alone(driver: Driver, n: int = 8) -> list[list[int]]:
    return [driver.run(PREFIX + new, n, boundary=70, reuse=False)[0] for new in QUESTIONS]


def test_requests_for_one_cache_at_once_share_it(toy: Driver, tmp_path: Path) -> None:
    alone = _alone(toy)
    state = toy.save(PREFIX, tmp_path / "state")
    toy.evict()
    requests = _ask(toy, state)
    toy.step()
    assert _pooled(toy) == requests
    toy.finish()
    assert [toy.tokens(request) for request in requests] == alone
    ends = [toy.end(request).stats for request in requests]
    assert [end.source for end in ends] == ["slot", "slot", "slot"]
    assert [end.cached_tokens for end in ends] == [70, 70, 70]


def test_a_request_alone_runs_in_its_own_slot(toy: Driver, tmp_path: Path) -> None:
    state = toy.save(PREFIX, tmp_path / "state")
    toy.evict()
    toy.submit(PREFIX + QUESTIONS[0], boundary=70, restore=state)
    toy.step()
    assert _pooled(toy) == []
    toy.finish()


def test_one_that_comes_later_shares_with_those_that_run(toy: Driver, tmp_path: Path) -> None:
    alone = _alone(toy, 30)
    state = toy.save(PREFIX, tmp_path / "state")
    requests = []
    for new in QUESTIONS:
        requests.append(toy.submit(PREFIX + new, 30, boundary=70, restore=state))
        toy.step()
        toy.step()
    assert _pooled(toy) == requests[1:]
    toy.finish()
    assert [toy.tokens(request) for request in requests] == alone


def test_short_prefixes_are_not_shared(toy: Driver) -> None:
    requests = [toy.submit([*PROMPT[:20], *new], boundary=20) for new in QUESTIONS]
    toy.step()
    assert _pooled(toy) == []
    toy.finish()
    assert all(toy.end(request).stats.prompt_tokens == 24 for request in requests)


def test_a_full_pool_lets_sequences_go_on_elsewhere(toy: Driver, tmp_path: Path) -> None:
    """The pool holds 256 tokens: 70 and three times 80 are more."""
    alone = _alone(toy, 80)
    state = toy.save(PREFIX, tmp_path / "state")
    requests = _ask(toy, state, 80)
    toy.step()
    assert _pooled(toy) == requests
    toy.finish()
    assert [toy.tokens(request) for request in requests] == alone
    assert all(toy.end(request).reason == "length" for request in requests)


def test_a_prompt_that_comes_several_times_at_once_is_computed_once(toy: Driver) -> None:
    alone = _alone(toy)
    toy.evict()
    requests = _ask(toy, None)
    toy.finish()
    assert [toy.tokens(request) for request in requests] == alone
    evaluated = sorted(toy.end(request).stats.evaluated_tokens for request in requests)
    assert evaluated == [4, 4, 74]


def test_the_next_one_takes_over_when_the_first_is_cancelled(toy: Driver) -> None:
    alone = _alone(toy)
    toy.evict()
    first, second, third = _ask(toy, None)
    toy.step()
    toy.engine.handle(Cancel(first))
    toy.finish()
    assert [toy.tokens(second), toy.tokens(third)] == alone[1:]
    assert toy.end(second).stats.evaluated_tokens == 74 - CHUNK


def test_a_slot_in_use_is_copied_and_not_computed_again(whole_streams: Driver) -> None:
    driver = whole_streams
    alone = _alone(driver)
    driver.evict()
    requests = _ask(driver, None)
    driver.finish()
    assert [driver.tokens(request) for request in requests] == alone
    assert sum(driver.end(request).stats.evaluated_tokens for request in requests) == 74 + 4 + 4


@pytest.fixture
def whole_streams() -> Driver:
    """Never shares."""
    driver = Driver(small_model("toy:eos=0"))
    driver.engine.scheduler.pool = None
    return driver


def test_a_state_that_is_gone_is_computed_by_those_who_wanted_it(toy: Driver, tmp_path: Path) -> None:
    alone = _alone(toy)
    state = toy.save(PREFIX, tmp_path / "state")
    toy.evict()
    (tmp_path / "state").unlink()
    requests = _ask(toy, state)
    toy.finish()
    assert [toy.tokens(request) for request in requests] == alone
    assert [toy.end(request).stats.source for request in requests] == ["none", "none", "none"]


def test_a_conversation_goes_on_where_it_ended_in_the_pool(toy: Driver, tmp_path: Path) -> None:
    state = toy.save(PREFIX, tmp_path / "state")
    toy.evict()
    requests = _ask(toy, state)
    toy.finish()
    follow_up = [*PREFIX, *QUESTIONS[1], *toy.tokens(requests[1]), 40, 41]
    cold, _ = toy.run(follow_up, boundary=70, reuse=False)
    warm, end = toy.run(follow_up, boundary=70, restore=state)
    assert warm == cold
    assert end.stats.cached_tokens == len(follow_up) - 3


def test_another_prefix_takes_the_pool_over_when_it_is_idle(toy: Driver, tmp_path: Path) -> None:
    state = toy.save(PREFIX, tmp_path / "state")
    other = toy.save(OTHER[:60], tmp_path / "other")
    _ask(toy, state)
    toy.finish()
    prompts = [OTHER[:60] + new for new in QUESTIONS]
    alone = [toy.run(prompt, boundary=60, reuse=False)[0] for prompt in prompts]
    requests = [toy.submit(prompt, boundary=60, restore=other) for prompt in prompts]
    toy.step()
    assert _pooled(toy) == requests
    toy.finish()
    assert [toy.tokens(request) for request in requests] == alone


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_in_whatever_order_gets_its_own_answer(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    driver = Driver(small_model("toy:eos=0"))
    plain = Driver(small_model("toy:eos=0"))
    prefixes = [PREFIX, OTHER[:60], PROMPT[:33]]
    states = [driver.save(prefix, tmp_path / str(i)) for i, prefix in enumerate(prefixes)]
    asked: dict[int, tuple[list[int], int]] = {}
    for _ in range(40):
        which, n = rng.randrange(3), rng.choice([1, 8, 60])
        tokens = prefixes[which] + [rng.randrange(30, 60) for _ in range(rng.randrange(1, 40))]
        restore = rng.choice([states[which], None])
        request = driver.submit(tokens, n, boundary=len(prefixes[which]), restore=restore)
        asked[request] = (tokens, n)
        for _ in range(rng.randrange(8)):
            driver.step()
        if rng.random() < 0.1:
            driver.engine.handle(Cancel(request))
            del asked[request]
    driver.finish()
    for request, (tokens, n) in asked.items():
        assert driver.tokens(request) == plain.run(tokens, n, reuse=False)[0]
        stats = driver.end(request).stats
        assert stats.cached_tokens + stats.evaluated_tokens == len(tokens)


@pytest.mark.real_model
def test_the_real_model_answers_alike_in_the_pool(smollm2: Model, tmp_path: Path) -> None:
    driver = Driver(smollm2)
    alone = _alone(driver, 4)
    state = driver.save(PREFIX, tmp_path / "state")
    driver.evict()
    requests = _ask(driver, state, 4)
    driver.step()
    assert _pooled(driver) == requests
    driver.finish()
    # Beside others a sequence's last bits may differ, and so may a token where two are equally likely.
    assert driver.tokens(requests[0]) == alone[0]
    assert [driver.end(request).stats.cached_tokens for request in requests] == [70, 70, 70]


@pytest.mark.real_model
def test_a_state_saved_with_some_slots_is_restored_with_others(smollm2: Model, tmp_path: Path) -> None:
    driver = Driver(smollm2)
    cold, _ = driver.run(PREFIX + QUESTIONS[0], boundary=70, reuse=False)
    state = driver.save(PREFIX, tmp_path / "state")
    for slots in (1, 5):
        other = Driver(small_model(embedded_model(), slots))
        warm, end = other.run(PREFIX + QUESTIONS[0], boundary=70, restore=state)
        assert warm == cold
        assert end.stats.source == "file"


def test_chunks_shrink_with_depth_and_are_cut_alike_from_any_cut() -> None:
    chunking = Chunking(64, longest_ms=100, pass_ms=5, token_ms=1, attend_ms=0.005)
    whole = [0]
    while whole[-1] < 3000:
        whole.append(chunking.end(whole[-1], 0, 3000))
    sizes = [b - a for a, b in itertools.pairwise(whole)]
    assert sizes[0] > sizes[-2]
    assert all(chunking.cost(a, b - a) <= 100 for a, b in itertools.pairwise(whole))
    assert all(chunking.last(0, at + 1) == at for at in whole[:-2])


def test_chunks_are_of_one_size_where_nothing_is_known_of_their_cost() -> None:
    chunking = Chunking(CHUNK)
    assert [chunking.end(at, 20, 60) for at in (0, 16, 20, 36, 52)] == [16, 20, 36, 52, 60]
