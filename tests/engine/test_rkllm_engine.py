"""The engine's contract on the NPU's runtime, as far as it applies, with a stand-in for each of its layouts.
It proves the protocol, not the NPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from headstart.caches.cache_file.format import identity_of
from headstart.engine.model import ModelError
from headstart.protocol import Cancel, Finished, Sampling, SaveTo, StateRef
from rkllm_driver import NpuDriver
from rkllm_standin import RELEASES

OPENING = "<|im_start|>system\nYou are the one who defines things.<|im_end|>\n<|im_start|>"
OTHER_OPENING = "<|im_start|>system\nYou answer in rhymes, whatever it is.<|im_end|>\n<|im_start|>"
REST = "user\nWhat is there?<|im_end|>\n<|im_start|>assistant\n"
PROMPT = OPENING + REST
COUNTING = [release for release in RELEASES if release != "1.2.0"]


@pytest.fixture
def switches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in's switches are what is written into this file."""
    file = tmp_path / "switches"
    file.write_text("")
    monkeypatch.setenv("RKLLM_STANDIN_FILE", str(file))
    return file


@pytest.fixture(params=RELEASES)
def driver(request: pytest.FixtureRequest, tmp_path: Path, switches: Path) -> Iterator[NpuDriver]:
    driver = NpuDriver(request.param, tmp_path)
    yield driver
    switches.write_text("")
    driver.engine.close()


def counts(driver: NpuDriver, cached: int) -> int:
    """What is told to have been cached where so much was."""
    return cached if driver.engine.info.counts_reuse else 0


def cold(driver: NpuDriver, text: str, max_tokens: int = 8) -> list[int]:
    tokens, end = driver.run(text, max_tokens, reuse=False)
    assert end.stats.cached_tokens == 0
    return tokens


def test_a_restored_prefix_gives_the_same_tokens_as_a_computed_one(driver: NpuDriver) -> None:
    expected = cold(driver, PROMPT)
    state = driver.save(OPENING)
    driver.run(OTHER_OPENING)
    warm, end = driver.run(PROMPT, boundary=state.n_tokens, restore=state)
    assert warm == expected
    assert end.stats.cached_tokens == counts(driver, state.n_tokens)
    assert end.stats.evaluated_tokens + end.stats.cached_tokens == driver.n_tokens(PROMPT)
    if driver.engine.info.counts_reuse:
        assert (end.stats.source, end.stats.restored_bytes) == ("file", state.nbytes)


def test_states_taken_in_turn_are_each_found_again(driver: NpuDriver) -> None:
    prompts = {OPENING: PROMPT, OTHER_OPENING: OTHER_OPENING + REST}
    expected = {opening: cold(driver, prompt) for opening, prompt in prompts.items()}
    states = {opening: driver.save(opening, f"state{i}") for i, opening in enumerate(prompts)}
    assert expected[OPENING] != expected[OTHER_OPENING]
    for _ in range(3):
        for opening, prompt in prompts.items():
            state = states[opening]
            warm, end = driver.run(prompt, boundary=state.n_tokens, restore=state)
            assert warm == expected[opening]
            assert end.stats.cached_tokens == counts(driver, state.n_tokens)


def test_what_is_in_memory_is_used_without_a_restore(driver: NpuDriver) -> None:
    state = driver.save(OPENING)
    driver.run(PROMPT, boundary=state.n_tokens, restore=state)
    follow_up = PROMPT + "More.<|im_end|>\n"
    expected = cold(driver, follow_up)
    driver.run(PROMPT, boundary=state.n_tokens, restore=state)
    warm, end = driver.run(follow_up, boundary=state.n_tokens, restore=state)
    assert warm == expected
    if driver.engine.info.counts_reuse:
        assert end.stats.cached_tokens >= driver.n_tokens(PROMPT)
        assert end.stats.source == "slot"


def test_without_reuse_every_token_is_evaluated(driver: NpuDriver) -> None:
    expected = cold(driver, PROMPT)
    state = driver.save(OPENING)
    again, end = driver.run(PROMPT, boundary=state.n_tokens, restore=state, reuse=False)
    assert again == expected
    assert (end.stats.cached_tokens, end.stats.evaluated_tokens) == (0, driver.n_tokens(PROMPT))


def test_only_the_shared_part_of_a_state_is_used(driver: NpuDriver) -> None:
    changed = OPENING.replace("things", "other things") + REST
    expected = cold(driver, changed)
    state = driver.save(OPENING)
    driver.run(OTHER_OPENING)
    shared = driver.n_tokens("<|im_start|>system\nYou are the one who defines ")
    warm, end = driver.run(changed, boundary=shared, restore=state, shared=shared)
    assert warm == expected
    assert end.stats.cached_tokens == counts(driver, shared)


def test_a_state_that_ends_within_what_text_merges_is_used_as_far_as_it_goes(driver: NpuDriver) -> None:
    """Completions continue a text, whose last characters may become one token with the first that follow."""
    begun, whole = "Then there was nothing, so th", "Then there was nothing, so they left"
    expected = cold(driver, whole)
    state = driver.save(begun)
    driver.run(OTHER_OPENING)
    warm, end = driver.run(whole, boundary=state.n_tokens - 1, restore=state)
    assert warm == expected
    assert end.stats.cached_tokens == counts(driver, state.n_tokens - 1)


@pytest.mark.parametrize("damage", ["gone", "changed", "cut off", "another geometry"])
def test_a_state_that_can_not_be_restored_is_computed(driver: NpuDriver, tmp_path: Path, damage: str) -> None:
    expected = cold(driver, PROMPT)
    path = tmp_path / "state"
    state = driver.save(OPENING)
    driver.run(OTHER_OPENING)
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "changed":
        path.write_bytes(content + b"x")
    else:
        at = 12 + 4 * int.from_bytes(content[8:12], "little")
        path.write_bytes(content[:-3] if damage == "cut off" else content[:at] + b"\7" + content[at + 1 :])
        # As if it had been verified so.
        state = StateRef(str(path), 0, state.nbytes, state.n_tokens, identity_of(path.stat()))
    warm, end = driver.run(PROMPT, boundary=state.n_tokens, restore=state)
    assert warm == expected
    assert end.stats.source != "file"
    assert driver.run(PROMPT)[0] == expected


def test_requests_are_served_one_after_another_and_each_has_its_own_answer(driver: NpuDriver) -> None:
    prompts = [PROMPT + "x" * i for i in range(4)]
    expected = [cold(driver, prompt) for prompt in prompts]
    requests = [driver.submit(prompt) for prompt in prompts]
    driver.finish()
    assert [driver.tokens(request) for request in requests] == expected


def test_tokens_are_told_while_the_run_goes_on(driver: NpuDriver, switches: Path) -> None:
    switches.write_text("decode_ms=30")
    request = driver.submit(PROMPT, 20)
    driver.wait_for_token(request)
    assert len(driver.tokens(request)) < 20
    assert not any(isinstance(event, Finished) for event in driver.events[request])
    driver.finish()


def test_cancelling_ends_a_run_and_the_next_one_is_not_disturbed(driver: NpuDriver, switches: Path) -> None:
    expected = cold(driver, PROMPT)
    switches.write_text("decode_ms=20,abort=slow")
    request = driver.submit(PROMPT + "x", 400)
    driver.wait_for_token(request, 3)
    driver.engine.handle(Cancel(request))
    following = driver.submit(PROMPT)
    driver.finish()
    assert driver.end(request).reason == "cancelled"
    assert len(driver.tokens(request)) < 60
    assert driver.tokens(following) == expected


def test_cancelling_during_the_prefill_ends_the_run_after_it(driver: NpuDriver, switches: Path) -> None:
    switches.write_text("prefill_ms=3,abort=lost")
    request = driver.submit(PROMPT, 400)
    driver.step()
    driver.engine.handle(Cancel(request))
    driver.finish()
    assert driver.end(request).reason == "cancelled"
    assert len(driver.tokens(request)) < 5


def test_cancelling_a_waiting_request_leaves_the_others_alone(driver: NpuDriver, switches: Path) -> None:
    switches.write_text("decode_ms=20")
    running = driver.submit(PROMPT, 20)
    driver.step()
    waiting = driver.submit(PROMPT, 20)
    driver.engine.handle(Cancel(waiting))
    driver.step()
    assert driver.end(waiting).reason == "cancelled"
    driver.finish()
    assert driver.end(running).reason in ("length", "stop")


def test_a_state_is_loaded_after_a_run_that_was_cancelled_at_its_first_token(
    driver: NpuDriver, switches: Path
) -> None:
    expected = cold(driver, PROMPT)
    state = driver.save(OPENING)
    switches.write_text("decode_ms=300")
    request = driver.submit(OTHER_OPENING, 100)
    driver.wait_for_token(request)
    driver.engine.handle(Cancel(request))
    driver.finish()
    switches.write_text("")
    warm, end = driver.run(PROMPT, boundary=state.n_tokens, restore=state)
    assert warm == expected
    assert end.stats.cached_tokens == counts(driver, state.n_tokens)


def test_the_most_tokens_end_an_answer(driver: NpuDriver) -> None:
    answers = {n: driver.run(PROMPT, n, reuse=False) for n in (1, 3, 6)}
    for n, (tokens, end) in answers.items():
        assert len(tokens) == n
        assert end.reason == "length"
        assert answers[6][0][:n] == tokens


def test_the_end_of_the_context_ends_an_answer(driver: NpuDriver) -> None:
    text = "x" * (driver.engine.info.n_ctx - 4)
    tokens, end = driver.run(text, 4)
    assert (len(tokens), end.reason) == (4, "length")


def test_the_models_end_token_ends_an_answer(driver: NpuDriver) -> None:
    endings = [driver.run(f"{PROMPT}{i}", 300)[1].reason for i in range(8)]
    assert "stop" in endings


def test_generating_nothing_only_prefills(driver: NpuDriver) -> None:
    tokens, end = driver.run(PROMPT, 0)
    assert (tokens, end.reason, end.stats.evaluated_tokens) == ([], "length", driver.n_tokens(PROMPT))


def test_what_is_saved_is_computed_from_the_first_token_on(driver: NpuDriver) -> None:
    driver.run(PROMPT)
    request = driver.submit_save(OPENING)
    driver.finish()
    stats = driver.end(request).stats
    assert (stats.cached_tokens, stats.evaluated_tokens) == (0, driver.n_tokens(OPENING))


def test_a_saved_state_can_be_read_by_its_owner_alone(driver: NpuDriver, tmp_path: Path) -> None:
    driver.save(OPENING)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("fault", ["save=skip", "save=partial", "run=error", "load=fail"])
def test_a_state_that_was_not_saved_whole_fails_the_save_alone(
    driver: NpuDriver, switches: Path, tmp_path: Path, fault: str
) -> None:
    expected = cold(driver, PROMPT)
    switches.write_text(fault)
    request = driver.submit_save(OPENING)
    driver.finish()
    assert driver.failed(request).kind == "engine"
    assert not (tmp_path / "state").exists()
    switches.write_text("")
    assert driver.run(PROMPT)[0] == expected


def test_a_place_that_can_not_be_written_fails_the_save_alone(driver: NpuDriver, tmp_path: Path) -> None:
    expected = cold(driver, PROMPT)
    request = driver.submit(OPENING, 0, save_to=SaveTo(str(tmp_path / "absent" / "state")))
    driver.finish()
    assert driver.failed(request).kind in ("engine", "storage")
    assert driver.run(PROMPT)[0] == expected


def test_nothing_is_left_of_a_save_that_was_cancelled(
    driver: NpuDriver, switches: Path, tmp_path: Path
) -> None:
    switches.write_text("prefill_ms=3")
    request = driver.submit_save(OPENING)
    driver.step()
    driver.engine.handle(Cancel(request))
    driver.finish()
    assert driver.end(request).reason == "cancelled"
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("fault", ["run=fail", "run=error"])
def test_a_run_that_fails_fails_its_request_and_no_other(
    driver: NpuDriver, switches: Path, fault: str
) -> None:
    expected = cold(driver, PROMPT)
    faulty = driver.engine._runtime
    switches.write_text(fault)
    request = driver.submit(PROMPT)
    driver.finish()
    assert driver.failed(request).kind == "engine"
    switches.write_text("")
    assert driver.run(PROMPT)[0] == expected
    assert driver.engine._runtime is not faulty


def test_a_file_that_is_not_the_one_that_was_verified_never_gets_to_the_runtime(
    driver: NpuDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = driver.save(OPENING)
    path = tmp_path / "state"
    path.write_bytes(path.read_bytes() + b"x")
    loaded: list[str] = []
    assert driver.engine._runtime
    monkeypatch.setattr(driver.engine._runtime, "load_cache", loaded.append)
    driver.run(OTHER_OPENING)
    driver.run(PROMPT, boundary=state.n_tokens, restore=state)
    assert loaded == []


def test_a_cancellation_that_the_runtime_did_not_hear_is_heeded_at_the_next_token(
    driver: NpuDriver, switches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switches.write_text("decode_ms=20")
    request = driver.submit(PROMPT, 400)
    driver.wait_for_token(request)
    with monkeypatch.context() as deaf:
        assert driver.engine._runtime
        deaf.setattr(driver.engine._runtime, "abort", lambda: None)
        driver.engine.handle(Cancel(request))
    driver.finish()
    assert driver.end(request).reason == "cancelled"
    # The whole answer takes seconds.
    assert driver.end(request).stats.decode_ms < 500


def test_a_run_that_was_not_told_to_be_finished_at_once_is_waited_for(
    driver: NpuDriver, switches: Path
) -> None:
    expected = cold(driver, PROMPT)
    switches.write_text("late=200")
    assert driver.run(PROMPT)[0] == expected


def test_a_state_cached_by_no_count_is_not_told_to_be_cached(driver: NpuDriver, switches: Path) -> None:
    """The runtime says what it evaluated. That a state was loaded proves nothing."""
    expected = cold(driver, PROMPT)
    state = driver.save(OPENING)
    driver.run(OTHER_OPENING)
    switches.write_text("reuse=none")
    warm, end = driver.run(PROMPT, boundary=state.n_tokens, restore=state)
    assert warm == expected
    assert (end.stats.cached_tokens, end.stats.source) == (0, "none")


@pytest.mark.parametrize("release", COUNTING)
def test_memory_that_is_not_used_is_not_relied_on_again(release: str, tmp_path: Path, switches: Path) -> None:
    driver = NpuDriver(release, tmp_path)
    state = driver.save(OPENING)
    driver.run(PROMPT, boundary=state.n_tokens, restore=state)
    switches.write_text("reuse=none")
    driver.run(PROMPT, boundary=state.n_tokens, restore=state)
    switches.write_text("")
    _, end = driver.run(PROMPT, boundary=state.n_tokens, restore=state)
    assert (end.stats.source, end.stats.cached_tokens) == ("file", state.n_tokens)
    driver.engine.close()


@pytest.mark.parametrize("release", COUNTING)
def test_what_was_computed_for_another_key_is_forgotten_beyond_what_is_public(
    release: str, tmp_path: Path
) -> None:
    driver = NpuDriver(release, tmp_path)
    n = driver.n_tokens(OPENING)
    driver.run(PROMPT, owner="one")
    assert driver.run(PROMPT, owner="two", boundary=n, public=n)[1].stats.cached_tokens == 0
    assert driver.run(PROMPT, owner="two")[1].stats.cached_tokens > n
    driver.run(OPENING + "one's", owner="one")
    assert driver.run(PROMPT, owner="two", boundary=n, public=n)[1].stats.cached_tokens == n
    driver.engine.close()


def test_requests_have_their_own_sampling_from_1_3_0_on(driver: NpuDriver) -> None:
    warm = Sampling(temperature=1.5, top_k=0)
    if driver.engine.info.sampling is None:
        assert driver.run(PROMPT, sampling=warm)[0] != driver.run(PROMPT)[0]
    else:
        assert driver.engine.info.sampling == Sampling()
        assert driver.run(PROMPT, sampling=warm)[0] == driver.run(PROMPT)[0]


@pytest.mark.parametrize("release", RELEASES)
def test_a_model_that_can_not_be_loaded_is_told(release: str, tmp_path: Path, switches: Path) -> None:
    switches.write_text("init=fail")
    with pytest.raises(ModelError, match="rkllm_init answered -1"):
        NpuDriver(release, tmp_path)
    switches.write_text("")
    with pytest.raises(ModelError, match="multiple of 32"):
        NpuDriver(release, tmp_path, ctx=500)


@pytest.mark.parametrize("release", RELEASES)
def test_the_answer_is_the_same_whatever_way_its_text_comes(
    release: str, tmp_path: Path, switches: Path
) -> None:
    """Ids count; the runtime's own text may come in halves of characters, or not at all."""
    switches.write_text("utf8=1")
    driver = NpuDriver(release, tmp_path)
    whole = cold(driver, PROMPT, 40)
    switches.write_text("utf8=1,split=1")
    assert cold(driver, PROMPT, 40) == whole
    text = b"".join(map(driver.tokenizer.piece, whole)).decode(errors="ignore")
    assert not text.isascii()
    driver.engine.close()
