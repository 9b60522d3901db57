"""Room for caches: checked before anything is written, made by giving up what is worth least."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from cache_keys import cache_key
from conftest import StartServer
from driver import small_model
from headstart.caches.cache_file.format import StatePart
from headstart.caches.cache_file.writer import CacheWriter
from headstart.caches.entry import Entry, Fingerprint, Form, Origin, StoredForm
from headstart.caches.eviction import worth
from headstart.caches.index.usage import CacheUsage
from headstart.caches.store import Store
from headstart.engine.model import Piece
from headstart.errors import CacheNotFound, QuotaExceeded
from headstart.model_files import embedded_model
from headstart.service.caching.quota import Quota
from servers import Json, RunningServer, eventually, said

DAY = 86400.0


def prompt(n: int, seed: int = 0) -> str:
    """About n characters, hence n tokens of the toy model: 10 n bytes on the disk with both forms."""
    return "".join(f"{seed}-{i} " for i in range(n))[:n]


def shown(server: RunningServer, name: str) -> Json:
    answer: Json = server.http.get(f"/v1/cache/toy/{name}").json()
    return answer


def totals(server: RunningServer) -> Json:
    answer: Json = server.http.get("/v1/cache").json()
    return {name: answer[name] for name in ("used_bytes", "quota_bytes", "evictions")}


def on_disk(server: RunningServer) -> int:
    return sum((server.cache_dir / name).stat().st_size for name in server.files())


def limited(start_server: StartServer, megabytes: float) -> RunningServer:
    return start_server("--model", "toy=toy:ms_per_token=0.05", "--quota-mb", str(megabytes))


def test_without_a_quota_only_what_is_used_is_told(toy: RunningServer) -> None:
    toy.create("quota-none", prompt(500))
    assert totals(toy) == {"used_bytes": on_disk(toy), "quota_bytes": None, "evictions": 0}


@pytest.mark.slow
def test_the_files_of_all_caches_stay_within_the_quota(start_server: StartServer) -> None:
    server = limited(start_server, 0.15)
    for i in range(6):
        server.create(f"c{i}", prompt(3000, i))
        assert on_disk(server) <= 150_000
    found = totals(server)
    assert (found["used_bytes"], found["quota_bytes"]) == (on_disk(server), 150_000)
    assert found["evictions"] >= 3


@pytest.mark.slow
def test_an_evicted_cache_keeps_its_name_and_text_and_is_built_again_when_used(
    start_server: StartServer,
) -> None:
    server = limited(start_server, 0.1)
    server.create("first", prompt(3000), description="kept")
    expected = said(server.chat("Hi", use_cache="first"))
    server.http.patch("/v1/cache/toy/first", json={"pinned": False})
    for i in range(5):
        server.create("second", prompt(3000, i + 1))
        server.chat("Hi", use_cache="second")
        server.chat("Hi", use_cache="second")
        if shown(server, "first")["evicted"]:
            break
    first = shown(server, "first")
    assert (first["evicted"], first["forms"]) == (["chat", "completion"], {})
    assert (first["prompt"], first["description"], first["version"]) == (prompt(3000), "kept", 1)
    missed = server.chat("Hi", use_cache="first")
    assert said(missed) == expected
    assert missed["usage"]["cache_hit"] is False
    assert missed["usage"]["cache_miss_reason"] == "evicted"
    hit = server.chat("Hi", use_cache="first")
    assert said(hit) == expected
    assert hit["usage"]["cache_hit"] is True
    again = shown(server, "first")
    assert (again["evicted"], again["version"]) == ([], 1)
    assert on_disk(server) <= 100_000


def test_an_evicted_cache_survives_a_restart(start_server: StartServer) -> None:
    server = limited(start_server, 0.05)
    server.create("first", prompt(2000))
    server.create("second", prompt(2000, 1))
    assert shown(server, "first")["evicted"]
    for index in server.cache_dir.glob("index.sqlite*"):
        index.unlink()
    server.restart()
    assert shown(server, "first")["evicted"] == ["chat", "completion"]
    assert server.chat("Hi", use_cache="first")["usage"]["cache_miss_reason"] == "evicted"


def test_a_pinned_cache_is_never_evicted_and_the_refusal_says_what_to_do(start_server: StartServer) -> None:
    server = limited(start_server, 0.1)
    server.create("pinned", prompt(3000), pinned=True)
    refused = server.post("/v1/cache/toy", cache_name="new", prompt=prompt(3900, 1))
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["type"]) == (507, "quota_exceeded", "server_error")
    assert "quota_mb" in error["message"]
    assert refused.headers["x-should-retry"] == "false"
    assert server.files() == ["toy/pinned.headstart"]
    assert server.chat("Hi", use_cache="pinned")["usage"]["cache_hit"] is True
    assert totals(server)["evictions"] == 0


def test_what_can_never_fit_evicts_nothing(start_server: StartServer) -> None:
    server = limited(start_server, 0.03)
    server.create("small", prompt(500))
    assert server.post("/v1/cache/toy", cache_name="big", prompt=prompt(3900)).status_code == 507
    assert shown(server, "small")["evicted"] == []


def test_when_there_is_no_room_for_a_new_version_the_old_one_still_works(start_server: StartServer) -> None:
    server = limited(start_server, 0.03)
    server.create("text", prompt(500))
    assert server.post("/v1/cache/toy", cache_name="text", prompt=prompt(3900)).status_code == 507
    assert server.chat("Hi", use_cache="text")["usage"]["cache_hit"] is True
    assert shown(server, "text")["version"] == 1


def test_a_new_version_needs_no_room_beside_the_old_one(start_server: StartServer) -> None:
    server = limited(start_server, 0.06)
    server.create("text", prompt(3000))
    assert server.create("text", prompt(3000, 1))["version"] == 2
    assert totals(server)["evictions"] == 0


def test_room_is_checked_before_anything_is_computed(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=20", "--quota-mb", "0.01")
    refused = server.http.post(
        "/v1/cache/toy", json={"cache_name": "big", "prompt": prompt(3900), "stream": True}, timeout=5
    )
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "quota_exceeded")


def test_a_quota_that_became_lower_holds_from_the_start(start_server: StartServer, tmp_path: Path) -> None:
    server = limited(start_server, 0)
    for i in range(3):
        server.create(f"c{i}", prompt(3000, i))
    server.stop()
    lower = start_server("--model", "toy=toy:", "--quota-mb", "0.08", cache_dir=server.cache_dir)
    eventually(lambda: on_disk(lower) <= 80_000, 5)


def test_requests_that_run_while_their_cache_is_evicted_end_as_they_would(start_server: StartServer) -> None:
    server = limited(start_server, 0.06)
    server.create("first", prompt(3000))
    expected = said(server.chat("Hi", use_cache="first"))
    with server.http.stream(
        "POST",
        "/v1/chat/completions",
        json={
            "model": "toy",
            "use_cache": "first",
            "stream": True,
            "temperature": 0,
            "max_tokens": 24,
            "messages": [{"role": "user", "content": "Hi"}],
        },
    ) as running:
        server.create("second", prompt(3000, 1))
        assert shown(server, "first")["evicted"]
        text = "".join(running.iter_text())
    assert text.rstrip().endswith("[DONE]")
    assert said(server.chat("Hi", use_cache="first")) == expected


# What is worth how much.

ENTRY = Entry(
    "toy", "one", "text", 1, 0.0, 0.0, Fingerprint("w", "e", {}, "t"), {}, 1000.0, 2.0, (1, 1, 1000, 1)
)


def test_what_saves_more_seconds_for_a_byte_is_worth_more() -> None:
    slow, large = replace(ENTRY, build_ms=2000.0), replace(ENTRY, identity=(1, 1, 2000, 1))
    assert worth(slow, CacheUsage(), 0) > worth(ENTRY, CacheUsage(), 0) > worth(large, CacheUsage(), 0)


def test_hits_add_worth_and_days_without_one_halve_it() -> None:
    used = CacheUsage(hits=3, last_used=10 * DAY)
    assert worth(ENTRY, used, 10 * DAY) == 4 * worth(ENTRY, CacheUsage(), 0)
    assert worth(ENTRY, used, 11 * DAY) == worth(ENTRY, used, 10 * DAY) / 2
    assert worth(ENTRY, used, 10_000 * DAY) > 0


def test_a_clock_that_was_set_back_changes_no_worth() -> None:
    assert worth(ENTRY, CacheUsage(1, 50 * DAY), -DAY) == worth(ENTRY, CacheUsage(1, 50 * DAY), 50 * DAY)


# What goes and what stays, on the disk.


async def _put(store: Store, name: str, size: int = 50_000, model: str = "toy", **fields: object) -> Entry:
    entry = replace(ENTRY, name=name, model=model, updated=store.clock(), **fields)
    source = store.directory / "state"
    source.write_bytes(bytes(size))
    form: Form = "chat"
    with store.scratch(entry.namespace) as path:
        writer = CacheWriter(path, entry, {form: [1, 2]})
        writer.copy(form, StatePart([1, 2], source, 0, size))
        return await store.put(writer, entry)


async def _hold(quota: Quota, name: str, size: int, namespace: str = "toy") -> None:
    with quota.reserving(cache_key(namespace, name)) as room:
        await room.reserve(size)


@pytest.mark.parametrize("origin", ["automatic", "derived"])
async def test_caches_that_nobody_named_go_whole(tmp_path: Path, origin: Origin) -> None:
    store = Store(tmp_path / "cache")
    quota = Quota(store, 100_000)
    await _put(store, "one", origin=origin)
    await _hold(quota, "new", 90_000)
    with pytest.raises(CacheNotFound):
        store.find(cache_key("toy", "one"))
    assert quota.used() == 0


@pytest.mark.parametrize("origin", ["client", "declared", "conversation"])
async def test_caches_that_somebody_named_keep_their_text(tmp_path: Path, origin: Origin) -> None:
    store = Store(tmp_path / "cache")
    await _put(store, "one", origin=origin)
    await _hold(Quota(store, 100_000), "new", 90_000)
    found = store.find(cache_key("toy", "one"))
    assert (found.prompt, found.evicted, found.forms) == ("text", ["chat"], {})
    assert found.size_bytes < 4096


async def test_only_as_many_go_as_must_the_least_worth_first(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    await _put(store, "dear", build_ms=9000.0)
    await _put(store, "cheap", build_ms=10.0)
    used = await _put(store, "used", build_ms=1000.0)
    for _ in range(100):
        store.used(used, 2, 0)
    await _put(store, "middle", build_ms=5000.0)
    await _hold(Quota(store, 210_000), "new", 100_000)
    assert {entry.name for entry in store.entries() if entry.evicted} == {"cheap", "middle"}


async def test_a_cache_that_is_being_built_does_not_go(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    await _put(store, "one")
    store.use(cache_key("toy", "one"))
    with pytest.raises(QuotaExceeded):
        await _hold(Quota(store, 100_000), "new", 90_000)
    assert store.find(cache_key("toy", "one")).forms


async def test_what_is_being_built_counts_till_it_is_done_or_given_up(tmp_path: Path) -> None:
    quota = Quota(Store(tmp_path / "cache"), 100_000)
    with quota.reserving(cache_key("toy", "a")) as room:
        await room.reserve(60_000)
        with pytest.raises(QuotaExceeded):
            await _hold(quota, "b", 60_000)
    await _hold(quota, "b", 60_000)


async def test_two_that_want_room_at_once_don_t_get_the_same(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    quota = Quota(store, 100_000)
    await _put(store, "old", 40_000)

    async def build(name: str) -> bool:
        with quota.reserving(cache_key("toy", name)) as room:
            try:
                await room.reserve(60_000)
            except QuotaExceeded:
                return False
            await asyncio.sleep(0.1)
            return True

    assert sorted(await asyncio.gather(build("a"), build("b"))) == [False, True]


async def test_a_shelf_may_have_a_quota_of_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    quota = Quota(store, shares={"ada": 100_000})
    await _put(store, "hers", owner="ada")
    await _put(store, "others")
    await _hold(quota, "new", 90_000, "toy@ada")
    assert store.find(cache_key("toy@ada", "hers")).evicted
    assert not store.find(cache_key("toy", "others")).evicted
    with pytest.raises(QuotaExceeded):
        await _hold(quota, "new", 110_000, "toy@ada")
    await _hold(quota, "new", 10**12)


@pytest.mark.parametrize("path", ["toy:", pytest.param("", marks=pytest.mark.real_model)])
def test_the_size_of_a_state_is_told_before_it_is_computed(path: str) -> None:
    model = small_model(path or embedded_model())
    model.clear(0)
    tokens = list(range(100, 116))
    for start in range(0, 160, 16):
        model.evaluate([Piece(0, start, tokens, start == 144)])
    size, told = len(model.save(0)), model.info.state_bytes + 160 * model.info.state_token_bytes
    assert size <= told < 1.1 * size


def test_giving_up_a_form_frees_its_state_and_its_tokens() -> None:
    form = StoredForm(100, 0, 400)
    assert replace(ENTRY, forms={"chat": form}).tensor_bytes == 800
