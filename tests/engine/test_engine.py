"""The engine's contract, on two engines: what a sequence gets doesn't depend on how it came to its state."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from conftest import beside_smollm2
from driver import CHUNK, OTHER, PROMPT, Driver, small_model
from headstart.caches.cache_file.format import identity_of
from headstart.engine.model import Model
from headstart.protocol import Cancel, Failed, Progress, Sampling, SaveTo, StateRef


@pytest.fixture
def whole_only() -> Driver:
    """A toy that can't cut states, as recurrent models can't."""
    return Driver(small_model("toy:eos=0,can_cut=0"))


@beside_smollm2
def test_a_restored_prefix_gives_the_same_tokens_as_a_computed_one(driver: Driver, tmp_path: Path) -> None:
    cold, _ = driver.run(PROMPT, boundary=70)
    state = driver.save(PROMPT[:70], tmp_path / "state")
    driver.evict()
    warm, end = driver.run(PROMPT, boundary=70, restore=state)
    assert warm == cold
    assert (end.stats.cached_tokens, end.stats.evaluated_tokens) == (70, 30)
    assert end.stats.source == "file"
    assert end.stats.restored_bytes == state.nbytes


def test_a_slot_that_holds_the_prefix_is_used_without_a_restore(driver: Driver, tmp_path: Path) -> None:
    cold, _ = driver.run(PROMPT, boundary=70, reuse=False)
    state = driver.save(PROMPT[:70], tmp_path / "state")
    warm, end = driver.run(PROMPT, boundary=70, restore=state)
    assert warm == cold
    assert (end.stats.cached_tokens, end.stats.source, end.stats.restored_bytes) == (70, "slot", 0)


def test_the_same_request_again_is_cut_where_it_was_cut_before(driver: Driver) -> None:
    cold, _ = driver.run(PROMPT, boundary=70)
    again, end = driver.run(PROMPT, boundary=70)
    assert again == cold
    assert end.stats.cached_tokens == 70 + CHUNK


def test_a_conversation_continues_from_its_own_answer(driver: Driver) -> None:
    answer, _ = driver.run(PROMPT)
    follow_up = [*PROMPT, *answer, 30, 31, 32]
    _, end = driver.run(follow_up)
    assert end.stats.cached_tokens == len(PROMPT) + len(answer) - 1


def test_without_reuse_every_token_is_evaluated(driver: Driver, tmp_path: Path) -> None:
    cold, _ = driver.run(PROMPT, boundary=70)
    state = driver.save(PROMPT[:70], tmp_path / "state")
    again, end = driver.run(PROMPT, boundary=70, restore=state, reuse=False)
    assert again == cold
    assert (end.stats.cached_tokens, end.stats.evaluated_tokens) == (0, len(PROMPT))


def test_only_the_shared_part_of_a_state_is_used(driver: Driver, tmp_path: Path) -> None:
    changed = [*PROMPT[:50], 9, 8, 7, 6]
    cold, _ = driver.run(changed, boundary=50, reuse=False)
    state = driver.save(PROMPT[:70], tmp_path / "state")
    driver.evict()
    warm, end = driver.run(changed, boundary=50, restore=state)
    assert warm == cold
    assert end.stats.cached_tokens == 50


@pytest.mark.parametrize("damage", ["gone", "changed", "wrong size of state"])
def test_a_state_that_can_not_be_restored_is_computed(driver: Driver, tmp_path: Path, damage: str) -> None:
    cold, _ = driver.run(PROMPT, boundary=70)
    path = tmp_path / "state"
    state = driver.save(PROMPT[:70], path)
    driver.evict()
    if damage == "gone":
        path.unlink()
    elif damage == "changed":
        path.write_bytes(path.read_bytes() + b"x")
    else:
        path.write_bytes(path.read_bytes()[:-3])
        state = StateRef(str(path), 0, state.nbytes - 3, 70, identity_of(path.stat()))
    warm, end = driver.run(PROMPT, boundary=70, restore=state)
    assert warm == cold
    assert (end.stats.cached_tokens, end.stats.source) == (0, "none")
    assert end.stats.evaluated_tokens == len(PROMPT)


@beside_smollm2
def test_sequences_that_run_together_get_their_own_answers(driver: Driver) -> None:
    prompts = [PROMPT[: 20 + 13 * i] for i in range(5)]
    alone = [driver.run(prompt, reuse=False)[0] for prompt in prompts]
    requests = [driver.submit(prompt, reuse=False) for prompt in prompts]
    driver.finish()
    assert [driver.tokens(request) for request in requests] == alone


def test_a_running_sequence_gets_a_token_each_step_while_a_prompt_is_prefilled(driver: Driver) -> None:
    stream = driver.submit(PROMPT[:5], 40)
    driver.step()
    driver.submit(PROMPT, 1)
    before = len(driver.tokens(stream))
    for steps in range(1, 5):
        driver.step()
        assert len(driver.tokens(stream)) == before + steps
    driver.finish()


def test_prefill_takes_turns(driver: Driver) -> None:
    long = driver.submit(PROMPT * 2, 1)
    driver.step()
    short = driver.submit(OTHER[:10], 1)
    driver.step()
    driver.step()
    assert driver.end(short).reason == "length"
    assert not driver.events[long]
    driver.finish()


def test_cancelling_ends_a_sequence_within_one_step(driver: Driver) -> None:
    request = driver.submit(PROMPT[:5], 100)
    driver.step()
    driver.step()
    driver.engine.handle(Cancel(request))
    driver.step()
    assert driver.end(request).reason == "cancelled"
    assert not driver.engine.busy


def test_cancelling_a_waiting_sequence_leaves_the_others_alone(driver: Driver) -> None:
    running = [driver.submit(PROMPT[:5], 3) for _ in range(3)]
    waiting = driver.submit(PROMPT[:5], 3)
    driver.step()
    driver.engine.handle(Cancel(waiting))
    driver.finish()
    assert driver.end(waiting).reason == "cancelled"
    assert all(driver.end(request).reason == "length" for request in running)


def test_the_end_of_the_context_ends_an_answer(driver: Driver) -> None:
    n_ctx = driver.model.info.n_ctx
    prompt = (PROMPT * 3)[: n_ctx - 4]
    answer, end = driver.run(prompt, 100)
    assert (len(answer), end.reason) == (4, "length")


def test_generating_nothing_only_prefills(driver: Driver) -> None:
    answer, end = driver.run(PROMPT, 0)
    assert (answer, end.reason, end.stats.evaluated_tokens) == ([], "length", len(PROMPT))


def test_saving_tells_its_progress(driver: Driver, tmp_path: Path) -> None:
    driver.save(PROMPT[:40], tmp_path / "state")
    told = [(e.computed, e.total) for e in driver.events[1] if isinstance(e, Progress)]
    assert told == [(16, 40), (32, 40), (40, 40)]


def test_prefill_is_reported_from_its_start_on_if_requested(driver: Driver) -> None:
    for kept, more in ((0, {"reuse": False}), (96, {})):
        request = driver.submit(PROMPT, 4, progress=True, **more)
        driver.finish()
        told = [event for event in driver.events[request] if isinstance(event, Progress)]
        assert driver.events[request][: len(told)] == told
        assert [each.computed for each in told] == [*range(kept, 100, 16), 100]
        assert {(each.total, each.cached) for each in told} == {
            (100, driver.end(request).stats.cached_tokens)
        }
        assert [each.ms for each in told] == sorted(each.ms for each in told)
    driver.run(PROMPT, 4)
    assert not any(isinstance(event, Progress) for event in driver.events[driver.last_id])


def test_a_state_is_not_written_where_nobody_waits_for_it(driver: Driver, tmp_path: Path) -> None:
    request = driver.submit(PROMPT, 0, save_to=SaveTo(str(tmp_path / "absent")))
    driver.finish()
    driver.woken.get(timeout=10)
    driver.step()
    assert isinstance(driver.events[request][-1], Failed)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_fails_the_save_alone(driver: Driver) -> None:
    request = driver.submit(PROMPT[:40], 0, save_to=SaveTo("/dev/full"))
    driver.finish()
    driver.woken.get(timeout=10)
    driver.step()
    failed = driver.events[request][-1]
    assert isinstance(failed, Failed)
    assert failed.kind == "storage_full"
    assert driver.run(PROMPT)[1].reason == "length"


def test_seeded_sampling_is_repeated_exactly(driver: Driver) -> None:
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=7)
    first, _ = driver.run(PROMPT, 16, sampling=sampling, reuse=False)
    again, _ = driver.run(PROMPT, 16, sampling=sampling, reuse=False)
    other, _ = driver.run(PROMPT, 16, sampling=Sampling(1.0, top_k=0, top_p=1, min_p=0, seed=8), reuse=False)
    assert first == again != other


@pytest.mark.real_model
def test_penalties_count_the_prompt_whether_cached_or_not(smollm2: Model, tmp_path: Path) -> None:
    driver = Driver(smollm2)
    sampling = Sampling(temperature=0, repeat_penalty=1.8, presence_penalty=1.0)
    plain, _ = driver.run(PROMPT, 12, boundary=70)
    cold, _ = driver.run(PROMPT, 12, boundary=70, sampling=sampling, reuse=False)
    state = driver.save(PROMPT[:70], tmp_path / "state")
    driver.evict()
    warm, _ = driver.run(PROMPT, 12, boundary=70, restore=state, sampling=sampling)
    assert warm == cold != plain


def test_a_state_that_can_not_be_cut_is_used_whole(whole_only: Driver, tmp_path: Path) -> None:
    cold, _ = whole_only.run(PROMPT, boundary=70, reuse=False)
    state = whole_only.save(PROMPT[:70], tmp_path / "state")
    whole_only.evict()
    warm, end = whole_only.run(PROMPT, boundary=70, restore=state)
    assert warm == cold
    assert end.stats.cached_tokens == 70


def test_a_state_that_can_not_be_cut_is_never_cut(whole_only: Driver, tmp_path: Path) -> None:
    changed = [*PROMPT[:50], 9, 8, 7, 6]
    cold, _ = whole_only.run(changed, boundary=50, reuse=False)
    state = whole_only.save(PROMPT[:70], tmp_path / "state")
    for _ in range(2):
        warm, end = whole_only.run(changed, boundary=50, restore=state)
        assert warm == cold
        assert end.stats.cached_tokens == 0


def test_an_evaluation_that_fails_fails_its_sequences_and_no_others() -> None:
    driver = Driver(small_model("toy:eos=0"))
    expected, _ = driver.run(PROMPT, 30)
    good = driver.submit(PROMPT, 30)
    driver.step()
    bad = driver.submit([9999], 5)
    driver.finish()
    assert isinstance(driver.events[bad][-1], Failed)
    assert driver.tokens(good) == expected
    assert driver.run(OTHER)[1].reason == "length"


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO])
def test_an_engine_that_logs_for_debugging_checks_its_scheduler(
    level: int, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Driver(small_model("toy:eos=0"))
    driver.submit(PROMPT)
    driver.engine.step()
    driver.engine.scheduler.running[0].slot = None
    with caplog.at_level(level, "headstart.engine.core.engine"):
        if level == logging.DEBUG:
            with pytest.raises(AssertionError):
                driver.engine.step()
        else:
            driver.engine.step()
