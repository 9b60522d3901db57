"""A cache is what its file says: neither the index nor the copy of a header is believed over it."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from cache_keys import cache_key
from conftest import StartServer
from headstart.caches.cache_file import format
from headstart.caches.entry import Entry
from headstart.caches.files import sha256_of
from headstart.caches.store import Store
from headstart.errors import CacheConflict, CacheNotFound
from servers import Json, RunningServer, said
from small_caches import put_small
from sweeps import swept

PROMPT = "The lamp costs 100 euros. " + "Each evening you light the lamp. " * 12


def _files(directory: Path, pattern: str = "*/*.headstart") -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(directory.glob(pattern)) if path.is_file()}


def _shown(server: RunningServer, name: str = "price") -> Json:
    answer: Json = server.http.get(f"/v1/cache/toy/{name}").json()
    return answer


def _verdict(server: RunningServer, **wish: object) -> Json:
    (verdict,) = server.post("/v1/verify", model="toy", cache_name="price", **wish).json()["data"]
    return dict(verdict)


@pytest.fixture
def server(start_server: StartServer) -> RunningServer:
    server = start_server("--model", "toy=toy:", "--slots", "1")
    server.create("price", PROMPT)
    return server


def _damage_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(b"100 euros")
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
def test_a_prompt_changed_wherever_it_lies_but_in_its_file_changes_nothing(server: RunningServer) -> None:
    expected = said(server.chat("How much?", use_cache="price"))
    server.stop()
    before = _files(server.cache_dir)
    n_changed = 0
    for path, data in _files(server.cache_dir, "**/*").items():
        if path.suffix != ".headstart" and b"100 euros" in data:
            path.write_bytes(data.replace(b"100 euros", b"900 euros"))
            n_changed += 1
    assert n_changed > 0
    for _ in range(2):
        server.start()
        assert _shown(server)["prompt"] == PROMPT
        answer = server.chat("How much?", use_cache="price")
        assert (said(answer), answer["usage"]["cache_hit"]) == (expected, True)
        assert _files(server.cache_dir) == before
        server.stop()


def test_a_damaged_header_is_made_good_from_its_copy_which_is_said(server: RunningServer) -> None:
    expected = said(server.chat("How much?", use_cache="price"))
    server.stop()
    _damage_header(server.cache_dir / "toy" / "price.headstart")
    server.start()
    shown = _shown(server)
    assert (shown["prompt"], shown["unverified"], shown["miss_reason"]) == (PROMPT, True, "corrupt")
    assert [cache["unverified"] for cache in server.http.get("/v1/cache").json()["data"]] == [True]
    assert "unverified, from the copy of its header" in _verdict(server)["detail"]
    assert "unverified" in server.log.read_text()
    missed = server.chat("How much?", use_cache="price")
    assert (said(missed), missed["usage"]["cache_miss_reason"]) == (expected, "corrupt")
    assert server.chat("How much?", use_cache="price")["usage"]["cache_hit"] is True
    assert (_shown(server)["prompt"], _shown(server)["unverified"]) == (PROMPT, False)
    assert "written anew with the unverified text of the copy" in server.log.read_text()


def test_verify_repairs_from_a_copy_and_says_so(server: RunningServer) -> None:
    server.stop()
    _damage_header(server.cache_dir / "toy" / "price.headstart")
    server.start()
    verdict = _verdict(server, repair=True)
    assert verdict["action"] == "rebuilt"
    assert "unverified, from the copy of its header" in verdict["detail"]
    assert (_shown(server)["prompt"], _shown(server)["unverified"]) == (PROMPT, False)


def test_where_the_copy_is_damaged_too_no_text_is_made_up_and_no_file_is_lost(server: RunningServer) -> None:
    server.stop()
    path = server.cache_dir / "toy" / "price.headstart"
    copy = server.cache_dir / ".headers" / "toy" / "price.header"
    _damage_header(path)
    _damage_header(copy)
    damaged = path.read_bytes()
    server.start()
    assert server.http.get("/v1/cache/toy/price").status_code == 404
    refused = server.post("/v1/chat/completions", model="toy", messages=[], use_cache="price")
    assert refused.status_code >= 400
    assert _verdict(server)["state"] == "damaged"
    assert _verdict(server, repair=True)["action"] == "set_aside"
    assert path.with_name("price.headstart.damaged").read_bytes() == damaged


def test_a_file_that_can_be_read_again_takes_the_place_of_its_copy(server: RunningServer) -> None:
    server.stop()
    path = server.cache_dir / "toy" / "price.headstart"
    whole = path.read_bytes()
    _damage_header(path)
    server.start()
    assert _shown(server)["unverified"] is True
    path.write_bytes(whole)
    assert (_shown(server)["unverified"], _shown(server)["would_hit"]) == (False, True)
    assert server.chat("How much?", use_cache="price")["usage"]["cache_hit"] is True
    assert path.read_bytes() == whole


@pytest.mark.parametrize("running", [True, False])
def test_another_caches_file_in_the_place_is_neither_used_nor_overwritten(
    server: RunningServer, running: bool
) -> None:
    server.create("other", "Another prompt. " * 20)
    if not running:
        server.stop()
    place = server.cache_dir / "toy" / "price.headstart"
    (server.cache_dir / "toy" / "other.headstart").replace(place)
    other = place.read_bytes()
    if not running:
        server.start()
    answer = server.post(
        "/v1/chat/completions",
        model="toy",
        messages=[{"role": "user", "content": "How much?"}],
        use_cache="price",
    )
    assert answer.status_code == 404
    server.post("/v1/verify", repair=True)
    assert place.read_bytes() == other


# On a store alone, for sweeps.


NAMES = [f"cache{i}" for i in range(6)]


async def _filled(directory: Path) -> dict[str, Entry]:
    """Caches, their usage, and the hash of a weights file."""
    store = Store(directory)
    entries = {name: await put_small(store, name, f"{name} costs 100 euros") for name in NAMES}
    for entry in entries.values():
        store.used(entry, 3)
    weights = directory.parent / "weights"
    weights.write_bytes(b"weights")
    await store.weights_hash(weights)
    store.close()
    return entries


def _flips(size: int) -> Iterator[tuple[int, int]]:
    rng = random.Random(7)
    return ((at, 1 << rng.randrange(8)) for at in range(size))


@pytest.mark.sweep
@pytest.mark.slow
async def test_a_flipped_byte_of_the_index_changes_no_cache(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    entries = await _filled(directory)
    files, index = _files(directory), directory / "index.sqlite"
    whole, weights = index.read_bytes(), tmp_path / "weights"
    n_forgotten = 0
    for at, bit in swept(_flips(len(whole))):
        data = bytearray(whole)
        data[at] ^= bit
        index.write_bytes(data)
        store = Store(directory)
        assert {entry.name: entry for entry in store.entries()} == entries, at
        assert not any(map(store.is_from_copy, entries.values()))
        hits = [store.usage(entry).hits for entry in entries.values()]
        assert set(hits) <= {0, 1}, at
        n_forgotten += hits.count(0)
        assert await store.weights_hash(weights) == sha256_of(weights), at
        for entry in entries.values():
            found = store.find(cache_key("toy", entry.name))
            assert (await store.verified(found, "chat")).tokens == [1, 2, 3]
            store.used(entry)
        store.close()
        assert _files(directory) == files, at
        with sqlite3.connect(index) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",), at
        database.close()
    assert n_forgotten > 0


@pytest.mark.slow
@pytest.mark.sweep
async def test_a_flipped_byte_of_the_indexs_log_changes_no_cache(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    entries = await _filled(directory)
    store = Store(directory)
    store.used(entries["cache1"])
    store.close()
    files = _files(directory)
    log = _log_of_a_killed_server(directory, entries)
    for at, bit in list(swept(_flips(len(log))))[::4]:
        data = bytearray(log)
        data[at] ^= bit
        (directory / "index.sqlite-wal").write_bytes(data)
        store = Store(directory)
        assert {entry.name: entry for entry in store.entries()} == entries, at
        store.close()
        assert _files(directory) == files, at


def _log_of_a_killed_server(directory: Path, entries: dict[str, Entry]) -> bytes:
    store = Store(directory)
    for entry in entries.values():
        store.used(entry)
    store.index.flush()
    log = (directory / "index.sqlite-wal").read_bytes()
    store.close()
    assert log
    return log


@pytest.mark.sweep
@pytest.mark.slow
async def test_a_flipped_byte_of_a_copy_changes_no_cache(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    entries = await _filled(directory)
    files, copy = _files(directory), directory / ".headers" / "toy" / "cache1.header"
    damaged, whole = directory / "toy" / "cache0.headstart", copy.read_bytes()
    for at, bit in swept(_flips(len(whole))):
        data = bytearray(whole)
        data[at] ^= bit
        copy.write_bytes(data)
        store = Store(directory)
        assert {entry.name: entry for entry in store.entries()} == entries, at
        assert _files(directory) == files, at
        store.close()
        # The start has made it anew. Flipped again, it is all there is of another cache.
        assert copy.read_bytes() == whole
        data = bytearray(copy.with_name("cache0.header").read_bytes())
        data[at] ^= bit
        copy.with_name("cache0.header").write_bytes(data)
        damaged.write_bytes(files[damaged][:8] + b"?" + files[damaged][9:])
        store = Store(directory)
        with pytest.raises(CacheNotFound):
            store.find(cache_key("toy", "cache0"))
        store.close()
        damaged.write_bytes(files[damaged])
        store = Store(directory)
        entries["cache0"] = store.find(cache_key("toy", "cache0"))
        assert entries["cache0"].prompt == "cache0 costs 100 euros"
        store.close()


async def test_a_repair_never_replaces_what_came_meanwhile(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    old = await put_small(store, "one", "the old prompt")
    new = await put_small(store, "one", "the new prompt")
    path = store.path(cache_key("toy", "one"))
    whole = path.read_bytes()
    with pytest.raises(CacheConflict):
        await put_small(store, "one", "the old prompt", repaired=old)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-3])
    assert (await put_small(store, "one", "the new prompt", repaired=new)).prompt == "the new prompt"
    path.unlink()
    with pytest.raises(CacheConflict):
        await put_small(store, "one", "the new prompt", repaired=new)
    assert not path.exists()


async def test_a_copy_of_an_older_version_is_never_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    await put_small(store, "one", "the old prompt")
    copy = tmp_path / "cache" / ".headers" / "toy" / "one.header"
    # No copy can be written where a folder has the scratch file's name.
    (copy.parent / ".scratch" / "x").mkdir(parents=True)
    await put_small(store, "one", "the new prompt")
    assert not copy.exists()
    store.close()
    store = Store(tmp_path / "cache")
    assert store.find(cache_key("toy", "one")).prompt == "the new prompt"


async def test_usage_of_a_deleted_cache_is_not_the_next_ones(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    entry = await put_small(store, "one", "the prompt")
    store.used(entry)
    store.delete(cache_key("toy", "one"))
    # Of a request that had begun before.
    store.used(entry)
    store.touch(entry)
    again = await put_small(store, "one", "the prompt")
    assert (store.usage(again).hits, store.usage(again).last_used) == (0, None)
    store.close()


async def test_a_copied_header_reads_as_the_file_does(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    entry = await put_small(store, "one", "the prompt")
    copied = format.read(tmp_path / "cache" / ".headers" / "toy" / "one.header", whole=False)
    assert replace(copied, identity=entry.identity) == entry
