"""The cache file and the directory: whole or absent, verified, readable by others."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from msgspec.structs import replace
from safetensors import safe_open

from cache_keys import cache_key
from headstart.caches.cache_file import format
from headstart.caches.cache_file.format import Corrupt, StatePart
from headstart.caches.cache_file.writer import CacheWriter
from headstart.caches.entry import Entry, Fingerprint, Form
from headstart.caches.files import storage_errors
from headstart.caches.store import Store
from headstart.errors import CacheNotFound, StartupError, StorageError, StorageFull
from headstart.names import CacheKey, Namespace
from headstart.service.caching.catalog import NamespaceCatalog
from headstart.service.models.tenant_model import TenantModel

FINGERPRINT = Fingerprint("w", "e", {"a": "b"}, "t")
ENTRY = Entry("toy", "one", "the prompt: ünï", 1, 10.0, 20.0, FINGERPRINT, {}, 1.0, 2.0)
TOKENS = [1, 2, 300, 4]
STATE = bytes(range(256)) * 40


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def _parts(directory: Path) -> dict[Form, StatePart]:
    (directory / "chat").write_bytes(STATE)
    (directory / "completion").write_bytes(STATE[:777])
    return {
        "chat": StatePart(TOKENS, directory / "chat", 0, len(STATE)),
        "completion": StatePart(TOKENS[:2], directory / "completion", 7, 770),
    }


async def _put(store: Store, entry: Entry, parts: dict[Form, StatePart]) -> Entry:
    with store.scratch(entry.namespace) as path:
        writer = CacheWriter(path, entry, {form: part.tokens for form, part in parts.items()})
        for form, part in parts.items():
            writer.copy(form, part)
        return await store.put(writer, entry)


async def _stored(store: Store, tmp_path: Path, entry: Entry = ENTRY) -> Entry:
    return await _put(store, entry, _parts(tmp_path))


async def test_a_cache_is_read_back_as_it_was_written(store: Store, tmp_path: Path) -> None:
    written = await _stored(store, tmp_path)
    path = store.path(cache_key("toy", "one"))
    assert format.read(path) == written
    assert format.verify(path, written.identity) == {"chat": TOKENS, "completion": TOKENS[:2]}
    chat = written.forms["chat"]
    assert path.read_bytes()[chat.state_offset :][: chat.state_bytes] == STATE
    assert written.size_bytes == path.stat().st_size


async def test_a_file_that_is_not_finished_is_none(store: Store, tmp_path: Path) -> None:
    parts = _parts(tmp_path)
    with store.scratch(Namespace("toy")) as path:
        writer = CacheWriter(path, ENTRY, {form: part.tokens for form, part in parts.items()})
        for form, part in parts.items():
            writer.copy(form, part)
            with pytest.raises(Corrupt):
                format.read(path)


async def test_the_header_has_room_for_times_that_are_known_last(store: Store, tmp_path: Path) -> None:
    parts = _parts(tmp_path)
    with store.scratch(Namespace("toy")) as path:
        short = replace(ENTRY, updated=0.0, build_ms=0.0, ttft_ms=0.0)
        writer = CacheWriter(path, short, {form: part.tokens for form, part in parts.items()})
        for form, part in parts.items():
            writer.copy(form, part)
        long = replace(ENTRY, updated=1700000000.123456789, build_ms=12345.678901234567, ttft_ms=1.0 / 3)
        stored = await store.put(writer, long)
    assert (stored.updated, stored.build_ms, stored.ttft_ms) == (long.updated, long.build_ms, long.ttft_ms)
    assert format.verify(store.path(cache_key("toy", "one")), stored.identity)["chat"] == TOKENS


async def test_standard_tools_can_open_a_cache(store: Store, tmp_path: Path) -> None:
    await _stored(store, tmp_path)
    with safe_open(store.path(cache_key("toy", "one")), "np") as tensors:
        assert tensors.get_tensor("chat.tokens").tolist() == TOKENS
        assert tensors.get_tensor("completion.state").tobytes() == STATE[7:777]
        assert "the prompt: ünï" in tensors.metadata()["entry"]
        assert tensors.metadata()["format"] == "headstart/1"


async def test_files_are_readable_by_their_owner_alone(store: Store, tmp_path: Path) -> None:
    await _stored(store, tmp_path)
    everything = [store.directory, *store.directory.rglob("*")]
    modes = {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in everything}
    assert modes == {(True, 0o700), (False, 0o600)}


async def test_any_flipped_bit_is_noticed(store: Store, tmp_path: Path) -> None:
    await _stored(store, tmp_path)
    path = store.path(cache_key("toy", "one"))
    whole = path.read_bytes()
    rng = random.Random(1)
    header = 8 + int.from_bytes(whole[:8], "little")
    offsets = [*range(0, header, 7), *(rng.randrange(len(whole)) for _ in range(300))]
    for offset in offsets:
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(Corrupt):
            format.verify(path, format.identity_of(path.stat()))
    assert len(offsets) > 400


async def test_a_truncated_file_is_noticed_when_it_is_read(store: Store, tmp_path: Path) -> None:
    await _stored(store, tmp_path)
    path = store.path(cache_key("toy", "one"))
    whole = path.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, 1000, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(Corrupt):
            format.read(path)


async def test_the_index_can_be_made_again_from_the_files(store: Store, tmp_path: Path) -> None:
    written = await _stored(store, tmp_path)
    store.close()
    (store.directory / "index.sqlite").unlink()
    again = Store(store.directory)
    assert again.entries() == [written]


async def test_an_index_that_can_not_be_read_is_replaced(store: Store, tmp_path: Path) -> None:
    written = await _stored(store, tmp_path)
    store.close()
    (store.directory / "index.sqlite").write_bytes(b"no database" * 100)
    for leftover in ("index.sqlite-wal", "index.sqlite-shm"):
        (store.directory / leftover).unlink(missing_ok=True)
    assert Store(store.directory).entries() == [written]


async def test_a_file_put_there_by_hand_is_found_and_one_taken_away_is_gone(
    store: Store, tmp_path: Path
) -> None:
    written = await _stored(store, tmp_path)
    path = store.path(cache_key("toy", "one"))
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(CacheNotFound):
        store.find(cache_key("toy", "one"))
    path.write_bytes(content)
    assert store.find(cache_key("toy", "one")).prompt == written.prompt


async def test_a_file_under_another_caches_name_is_not_taken_for_it(store: Store, tmp_path: Path) -> None:
    await _stored(store, tmp_path)
    store.path(cache_key("toy", "two")).write_bytes(store.path(cache_key("toy", "one")).read_bytes())
    with pytest.raises(CacheNotFound):
        store.find(cache_key("toy", "two"))


async def test_a_symbolic_link_is_not_followed(store: Store, tmp_path: Path) -> None:
    await _stored(store, tmp_path)
    outside = tmp_path / "outside"
    store.path(cache_key("toy", "one")).rename(outside)
    store.path(cache_key("toy", "one")).symlink_to(outside)
    shutil.rmtree(store.directory / ".headers")
    store.close()
    with pytest.raises(CacheNotFound):
        Store(store.directory).find(cache_key("toy", "one"))


async def test_a_damaged_file_keeps_what_was_known_so_that_it_can_be_built_again(
    store: Store, tmp_path: Path
) -> None:
    written = await _stored(store, tmp_path)
    store.path(cache_key("toy", "one")).write_bytes(b"rubbish")
    entry = store.find(cache_key("toy", "one"))
    assert entry.prompt == written.prompt
    with pytest.raises(Corrupt):
        await store.verified(entry, "chat")


async def test_replacing_leaves_an_open_old_version_as_it_was(store: Store, tmp_path: Path) -> None:
    await _stored(store, tmp_path)
    path = store.path(cache_key("toy", "one"))
    old = path.read_bytes()
    with path.open("rb") as reader:
        await _put(store, ENTRY, {"chat": StatePart([9], tmp_path / "completion", 0, 5)})
        assert reader.read() == old
    assert path.read_bytes() != old


async def test_a_write_that_fails_leaves_the_old_version_and_no_scratch_file(
    store: Store, tmp_path: Path
) -> None:
    written = await _stored(store, tmp_path)
    with pytest.raises(StorageError):
        await _put(store, ENTRY, {"chat": StatePart([9], tmp_path / "absent", 0, 5)})
    assert store.find(cache_key("toy", "one")) == written
    assert [path.name for path in (store.directory / "toy").iterdir()] == ["one.headstart"]


def test_a_full_disk_is_told_apart_from_other_failures() -> None:
    with pytest.raises(StorageFull), storage_errors("x"), Path("/dev/full").open("w") as full:
        full.write("x" * 100_000)
    with pytest.raises(StorageError), storage_errors("x"):
        os.unlink("/absent/file")  # noqa: PTH108


def test_what_an_interrupted_write_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    left_over = tmp_path / "cache" / "toy" / ".tmp-1234"
    left_over.parent.mkdir(parents=True)
    left_over.write_text("half")
    Store(tmp_path / "cache")
    assert not left_over.exists()


def test_a_directory_has_one_owner(store: Store) -> None:
    with pytest.raises(StartupError, match="Another Headstart server"):
        Store(store.directory)
    store.close()
    Store(store.directory)


async def test_a_weights_file_is_hashed_again_only_when_it_has_changed(store: Store, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_text("one")
    first = await store.weights_hash(weights)
    weights.write_text("other")
    assert await store.weights_hash(weights) != first
    store.index.put_weights_hash(str(weights), format.identity_of(weights.stat()), "0" * 64)
    assert await store.weights_hash(weights) == "0" * 64


async def test_a_cache_works_while_the_index_can_not_be_written(store: Store, tmp_path: Path) -> None:
    with sqlite3.connect(store.directory / "index.sqlite") as other:
        other.execute("BEGIN EXCLUSIVE")
    written = await _stored(store, tmp_path)
    store.used(written)
    assert (await store.verified(store.find(cache_key("toy", "one")), "chat")).tokens == TOKENS
    store.delete(cache_key("toy", "one"))
    assert store.entries() == []


async def test_of_the_caches_a_text_may_begin_with_the_longest_that_is_there_is_found(
    store: Store, tmp_path: Path
) -> None:
    prompts = {"short": "You are", "long": "You are the keeper", "gone": "You are the keeper of"}
    for name, prompt in prompts.items():
        await _stored(store, tmp_path, replace(ENTRY, name=name, prompt=prompt))
    store.path(cache_key("toy", "gone")).unlink()
    chat_only: dict[Form, StatePart] = {"chat": _parts(tmp_path)["chat"]}
    await _put(store, replace(ENTRY, name="chat", prompt="You are the keeper o"), chat_only)
    model = cast(TenantModel, SimpleNamespace(namespace=Namespace("toy")))
    namespaces = NamespaceCatalog(store)
    assert namespaces.known_prefix(model, "You are the keeper of the light") == "You are the keeper"
    assert namespaces.known_prefix(model, "You are not") == "You are"
    assert namespaces.known_prefix(model, "Am I?") == ""
    other = cast(TenantModel, SimpleNamespace(namespace=Namespace("other")))
    assert namespaces.known_prefix(other, "You are") == ""


async def test_only_caches_a_text_begins_with_are_looked_up_on_the_disk(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        await _stored(store, tmp_path, replace(ENTRY, name=f"n{i}", prompt=f"prompt {i}"))
    found: list[str] = []

    def find(key: CacheKey) -> Entry:
        found.append(key.name)
        return Store.find(store, key)

    monkeypatch.setattr(store, "find", find)
    model = cast(TenantModel, SimpleNamespace(namespace=Namespace("toy")))
    assert NamespaceCatalog(store).known_prefix(model, "prompt 3 and more") == "prompt 3"
    assert found == ["n3"]
