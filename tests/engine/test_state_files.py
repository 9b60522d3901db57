"""States are read from and written to disks without anybody else having to wait."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Event

import pytest

from driver import PROMPT, Driver, small_model
from headstart.caches.cache_file.format import identity_of
from headstart.engine.core import state_file
from headstart.protocol import Cancel, StateRef

PREFIX, SUFFIX = PROMPT[:70], PROMPT[70:]


@pytest.fixture
def toy() -> Driver:
    return Driver(small_model("toy:eos=0"))


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Event:
    """No state is in memory, and reading one takes until the event is set."""
    ready = Event()
    monkeypatch.setattr(state_file, "is_in_memory", lambda state: False)
    monkeypatch.setattr(state_file, "bring_into_memory", lambda state: ready.wait(10))
    return ready


def begin(toy: Driver, path: Path) -> tuple[int, int, StateRef]:
    """One request that generates, and a second one that is to start from a file."""
    state = toy.save(PREFIX, path)
    toy.evict()
    runs = toy.submit([9, 8, 7], 60)
    toy.step()
    return runs, toy.submit(PREFIX + SUFFIX, boundary=70, restore=state), state


def read(toy: Driver, waits: int, slow_disk: Event) -> None:
    """Lets the state come, and the request that waits for it start from it."""
    slow_disk.set()
    toy.woken.get(timeout=10)
    toy.step()
    toy.finish()
    assert toy.end(waits).stats.source == "file"


def test_a_state_that_is_not_in_memory_is_read_while_others_run(
    toy: Driver, tmp_path: Path, slow_disk: Event
) -> None:
    cold, _ = toy.run(PREFIX + SUFFIX, boundary=70, reuse=False)
    runs, waits, _ = begin(toy, tmp_path / "state")
    for _ in range(20):
        toy.step()
    assert len(toy.tokens(runs)) >= 20
    assert toy.events[waits] == []
    read(toy, waits, slow_disk)
    assert toy.tokens(waits) == cold


def test_a_worker_with_nothing_else_to_do_sleeps_while_a_state_is_read(
    toy: Driver, tmp_path: Path, slow_disk: Event
) -> None:
    runs, waits, _ = begin(toy, tmp_path / "state")
    toy.engine.handle(Cancel(runs))
    toy.step()
    assert not toy.engine.busy
    read(toy, waits, slow_disk)


def test_a_state_that_a_slot_holds_is_not_read_again(toy: Driver, tmp_path: Path, slow_disk: Event) -> None:
    state = toy.save(PREFIX, tmp_path / "state")
    toy.submit([9, 8, 7], 60)
    toy.step()
    asked = toy.submit(PREFIX + SUFFIX, boundary=70, restore=state)
    toy.finish()
    assert toy.end(asked).stats.source == "slot"
    assert not slow_disk.is_set()


def test_a_request_can_be_cancelled_while_its_state_is_read(
    toy: Driver, tmp_path: Path, slow_disk: Event
) -> None:
    runs, waits, _ = begin(toy, tmp_path / "state")
    toy.engine.handle(Cancel(waits))
    slow_disk.set()
    toy.woken.get(timeout=10)
    toy.finish()
    assert toy.end(waits).reason == "cancelled"
    assert toy.end(runs).reason == "length"


def test_a_state_that_goes_away_while_it_is_read_is_a_miss(toy: Driver, tmp_path: Path) -> None:
    cold, _ = toy.run(PREFIX + SUFFIX, boundary=70, reuse=False)
    state = toy.save(PREFIX, tmp_path / "state")
    toy.evict()
    toy.submit([9, 8, 7], 20)
    toy.step()
    (tmp_path / "state").unlink()
    asked = toy.submit(PREFIX + SUFFIX, boundary=70, restore=state)
    toy.finish()
    assert toy.tokens(asked) == cold
    assert toy.end(asked).stats.source == "none"


def test_what_the_page_cache_has_is_told_and_brought_there(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(os.urandom(100_000))
    state = StateRef(str(path), 5000, 90_000, 1, identity_of(path.stat()))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert not state_file.is_in_memory(state)
    state_file.bring_into_memory(state)
    assert state_file.is_in_memory(state)


def test_another_file_at_the_same_path_is_not_taken_for_the_state(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"first")
    state = StateRef(str(path), 0, 5, 1, identity_of(path.stat()))
    path.unlink()
    path.write_bytes(b"other content")
    with pytest.raises(OSError, match="another file"), state_file.mapped(state):
        pass
