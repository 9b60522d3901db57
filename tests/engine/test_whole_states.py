"""The engine on states that can only be used whole: they are, or not at all, and to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny_models
from driver import OTHER, PROMPT, Driver, small_model
from headstart.protocol import SaveTo, StateRef

pytestmark = pytest.mark.real_model

BOUNDARY = 70
LONG = PROMPT + OTHER
WHOLE_ONLY = [kind for kind in tiny_models.ARCHITECTURES if kind != "full"]


@pytest.fixture(scope="module", params=WHOLE_ONLY)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.written(tmp_path_factory.mktemp("model") / "tiny.gguf", request.param)


@pytest.fixture
def driver(file: Path) -> Driver:
    return Driver(small_model(str(file), slots=1))


def _state(driver: Driver, path: Path, boundary: int, restore: StateRef | None = None) -> bytes:
    """Of a long prompt."""
    path.touch()
    request = driver.submit(LONG, 0, boundary=boundary, save_to=SaveTo(str(path)), restore=restore)
    driver.finish()
    driver.woken.get(timeout=10)
    driver.step()
    assert driver.end(request).stats.source == ("file" if restore else "none")
    return path.read_bytes()


def test_what_follows_the_boundary_has_the_bits_it_has_after_a_restore(
    driver: Driver, tmp_path: Path
) -> None:
    """Also where it is longer than the window, whose cells then lie elsewhere: 37 places, no multiple of the
    numbers that are added at once."""
    boundary = tiny_models.WINDOW + 37
    cold = _state(driver, tmp_path / "cold", boundary)
    driver.evict()
    state = driver.save(LONG[:boundary], tmp_path / "state")
    driver.evict()
    assert _state(driver, tmp_path / "warm", boundary, state) == cold


def test_a_state_is_not_used_in_part_not_even_when_asked_to(driver: Driver, tmp_path: Path) -> None:
    prompt = PROMPT[:60] + OTHER[:20]
    cold, _ = driver.run(prompt, boundary=60)
    state = driver.save(PROMPT[:BOUNDARY], tmp_path / "state")
    driver.evict()
    answer, end = driver.run(prompt, boundary=60, restore=state)
    assert answer == cold
    assert (end.stats.source, end.stats.cached_tokens) == ("none", 0)


def test_a_slot_is_not_used_in_part(driver: Driver) -> None:
    cold, _ = driver.run(PROMPT[:80], boundary=60)
    driver.run(PROMPT, boundary=BOUNDARY)
    answer, end = driver.run(PROMPT[:80], boundary=60)
    assert answer == cold
    assert end.stats.cached_tokens == 0


def test_a_slot_is_used_whole_by_what_goes_on_from_it(driver: Driver) -> None:
    said, _ = driver.run(PROMPT, boundary=BOUNDARY)
    going_on = PROMPT + said + OTHER[:20]
    answer, end = driver.run(going_on, boundary=BOUNDARY)
    assert end.stats.cached_tokens == len(PROMPT) + len(said) - 1
    assert driver.run(going_on, boundary=BOUNDARY, reuse=False)[0] == answer


def test_a_slot_that_ends_where_a_request_would_not_be_cut_is_not_used(driver: Driver) -> None:
    """What comes after would be computed in other chunks, and differ in the last bits."""
    cold, _ = driver.run(PROMPT + OTHER, boundary=90)
    driver.evict()
    driver.run(PROMPT[:71], 1, boundary=BOUNDARY)
    answer, end = driver.run(PROMPT + OTHER, boundary=90)
    assert (answer, end.stats.cached_tokens) == (cold, 0)
