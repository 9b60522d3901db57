"""States that slots held are found again: in memory, on the disk, after a restart, with the same text."""

from __future__ import annotations

from pathlib import Path
from time import sleep

import pytest

from driver import CHUNK, OTHER, PROMPT, Driver, small_model
from headstart.engine.states.disk import DiskTier
from headstart.engine.states.store import StateStore
from headstart.protocol import Forget, Forgotten

ROOT = "ab" * 32
LONG = [3 + i * 7 % 190 for i in range(130)]
MEMORY = 1 << 24


class Kept(Driver):
    """A driver whose engine has a state store; `path`: the directory of its disk tier."""

    def __init__(
        self,
        model: str = "toy:",
        slots: int = 2,
        memory: int = MEMORY,
        path: Path | None = None,
        disk: int = 1 << 24,
        share_from: int = 0,
    ) -> None:
        self.model_path = model
        loaded = small_model(model, slots, share_from)
        tier = DiskTier(path, ROOT, disk, lambda: self.woken.put(None)) if path else None
        assert loaded.slices
        super().__init__(loaded, share_from, StateStore(loaded.slices, memory, tier))

    @property
    def store(self) -> StateStore:
        assert self.engine.store
        return self.engine.store

    def chat(self, tokens: list[int], n: int = 8, **more: object) -> list[int]:
        """The tokens of a prompt with its answer."""
        answer, _ = self.run(tokens, n, **more)
        return tokens + answer

    def rest(self) -> None:
        """Lets the engine do all that it does when idle."""
        self.engine.states.flush(10)

    def restart(self) -> Kept:
        assert self.store.disk
        path = self.store.disk.directory.path.parent
        self.rest()
        self.store.disk.directory.close()
        return Kept(self.model_path, self.model.info.slots, self.store.memory_limit, path)


@pytest.fixture(params=["toy:eos=0", "toy:eos=0,can_cut=0"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_conversation_goes_on_after_others_have_taken_all_slots(model: str) -> None:
    driver = Kept(model)
    said = driver.chat(LONG)
    driver.evict()
    turn = [*said, *OTHER[:10]]
    cold, _ = Driver(small_model(model, 2)).run(turn)
    answer, end = driver.run(turn)
    assert end.stats.source == "memory"
    assert end.stats.evaluated_tokens <= 11
    assert answer == cold


def test_what_nobody_else_needs_is_left_where_it_is(model: str) -> None:
    driver = Kept(model)
    said = driver.chat(LONG)
    _, end = driver.run([*said, *OTHER[:10]])
    assert end.stats.source == "slot"
    assert end.stats.evaluated_tokens <= 11
    assert driver.store.parked == 0


def test_another_chat_with_the_same_beginning_takes_an_empty_slot() -> None:
    driver = Kept("toy:eos=0")
    one = driver.chat([*LONG, *PROMPT[:40]])
    _, end = driver.run([*LONG, *OTHER[:40]])
    assert end.stats.cached_tokens >= len(LONG) - CHUNK
    _, end = driver.run([*one, 5, 6])
    assert end.stats.source == "slot"
    assert end.stats.evaluated_tokens <= 3


def test_the_disk_keeps_what_memory_has_no_room_for(model: str, tmp_path: Path) -> None:
    driver = Kept(model, memory=0, path=tmp_path)
    said = driver.chat(LONG)
    driver.evict()
    assert driver.store.disk
    driver.store.disk.wait_written()
    driver.store.shrink()
    assert driver.store.memory_bytes == 0
    answer, end = driver.run_waiting([*said, *OTHER[:10]])
    assert end.stats.source == "disk"
    assert end.stats.evaluated_tokens <= 11
    cold, _ = Driver(small_model(model, 2)).run([*said, *OTHER[:10]])
    assert answer == cold


def test_a_conversation_goes_on_after_a_restart(model: str, tmp_path: Path) -> None:
    driver = Kept(model, path=tmp_path)
    said = driver.chat(LONG)
    again = driver.restart()
    answer, end = again.run_waiting([*said, *OTHER[:10]])
    assert end.stats.source == "disk"
    assert end.stats.evaluated_tokens <= 11
    cold, _ = Driver(small_model(model, 2)).run([*said, *OTHER[:10]])
    assert answer == cold


@pytest.mark.parametrize("n_left", [0, 3, 100])
def test_an_answer_is_given_again_or_the_last_message_edited(model: str, n_left: int) -> None:
    driver = Kept(model)
    driver.chat(LONG)
    edited = LONG if n_left == 0 else [*LONG[:-n_left], *OTHER[:n_left]]
    _, end = driver.run(edited)
    assert end.stats.evaluated_tokens <= n_left + 2 * CHUNK or model.endswith("can_cut=0")
    cold, _ = Driver(small_model(model, 2)).run(edited)
    assert driver.tokens(driver.last_id) == cold


def test_an_answer_is_given_again_from_the_checkpoint_before_it() -> None:
    driver = Kept("toy:eos=0,can_cut=0")
    driver.chat(LONG)
    _, end = driver.run(LONG)
    assert end.stats.evaluated_tokens <= CHUNK
    driver.evict()
    _, end = driver.run(LONG)
    assert end.stats.evaluated_tokens <= CHUNK


def test_nothing_private_is_used_for_another_owner(model: str, tmp_path: Path) -> None:
    driver = Kept(model, path=tmp_path)
    said = driver.chat(LONG, owner="a")
    driver.evict()
    for other in ("b", "c"):
        _, end = driver.run_waiting([*said, 5, 6], owner=other)
        assert end.stats.cached_tokens == 0
        driver = driver.restart()
    _, end = driver.run_waiting([*said, 5, 6], owner="a")
    assert end.stats.cached_tokens >= len(said) - 1


def test_the_public_part_is_used_by_everybody(tmp_path: Path) -> None:
    driver = Kept("toy:eos=0", path=tmp_path)
    public = len(LONG)
    driver.chat([*LONG, *PROMPT[:90]], owner="a", boundary=public, public=public)
    driver.evict()
    _, end = driver.run([*LONG, *PROMPT[:90]], owner="b", boundary=public, public=public)
    assert end.stats.cached_tokens == public


def test_memory_stays_within_its_limit_and_the_ends_of_old_chains_go_first() -> None:
    driver = Kept("toy:eos=0", memory=4 * 700)
    chats = [driver.chat([20 + i, *LONG]) for i in range(6)]
    driver.rest()
    assert 0 < driver.store.memory_bytes <= 4 * 700
    assert driver.store.evictions
    _, end = driver.run([*chats[-1], 5])
    assert end.stats.evaluated_tokens <= 2


def test_the_disk_stays_within_its_limit(tmp_path: Path) -> None:
    driver = Kept("toy:eos=0", path=tmp_path, disk=12_000)
    for i in range(8):
        driver.chat([20 + i, *LONG])
        driver.rest()
        files = [path.stat().st_size for path in tmp_path.rglob("*.block")]
        assert sum(files) <= 12_000
        assert driver.store.disk
        assert sum(files) == driver.store.disk.n_bytes
    assert files


def test_what_was_not_to_be_written_is_in_memory_only(tmp_path: Path) -> None:
    driver = Kept("toy:eos=0", path=tmp_path)
    said = driver.chat(LONG, to_disk=False)
    driver.evict()
    driver.rest()
    assert driver.store.memory_bytes
    _, end = driver.run([*said, 5])
    assert end.stats.source == "memory"
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*.block"))
    assert bytes(memoryview(bytearray().join(t.to_bytes(4, "little") for t in LONG[:20]))) not in written


def test_forgetting_a_prompt_removes_it_everywhere(model: str, tmp_path: Path) -> None:
    driver = Kept(model, path=tmp_path)
    said = driver.chat(LONG)
    driver.evict()
    driver.rest()
    other = driver.chat(PROMPT)
    driver.engine.handle(Forget(1, None, LONG, [LONG[:32]]))
    (event,) = [e for e in driver.engine.step() if isinstance(e, Forgotten)]
    assert event.n_blocks
    needle = b"".join(t.to_bytes(4, "little") for t in LONG[100:110])
    assert not any(needle in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    _, end = driver.run([*said, 5])
    assert end.stats.cached_tokens <= 32
    _, end = driver.run([*other, 5])
    assert end.stats.evaluated_tokens <= 2


def test_a_damaged_block_costs_time_but_no_text(model: str, tmp_path: Path) -> None:
    driver = Kept(model, path=tmp_path)
    said = driver.chat(LONG)
    cold, _ = Driver(small_model(model, 2)).run([*said, 5])
    again = driver.restart()
    for path in tmp_path.rglob("*.block"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    answer, end = again.run_waiting([*said, 5])
    assert answer == cold
    assert end.stats.cached_tokens == 0
    assert again.store.verify_failures
    assert not list(tmp_path.rglob("*.block"))


def test_an_idle_engine_parks_and_writes_by_itself(model: str, tmp_path: Path) -> None:
    driver = Kept(model, path=tmp_path)
    driver.chat(LONG)
    for _ in range(100):
        if (pause := driver.engine.pause) is None and not driver.store.is_writing:
            break
        sleep(min(pause or 0.05, 1.5))
        driver.step()
    assert list(tmp_path.rglob("*.block"))
    assert driver.engine.pause is None
    assert driver.engine.report()


def test_what_is_about_to_be_used_is_not_dropped_for_what_it_replaces(model: str, tmp_path: Path) -> None:
    driver = Kept(model, slots=1, path=tmp_path)
    said = driver.chat(LONG)
    driver.chat(PROMPT)
    assert driver.store.disk
    driver.store.write_behind()
    driver.store.disk.wait_written()
    driver.store.memory_limit = driver.store.memory_bytes
    answer, end = driver.run([*said, 5, 6])
    assert end.stats.evaluated_tokens <= 3
    assert answer == Driver(small_model(model, 1)).run([*said, 5, 6])[0]
