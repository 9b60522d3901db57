"""How a cache is kept: its end, what is said about it, and how that is changed."""

from __future__ import annotations

import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from cache_keys import cache_key
from conftest import StartServer
from headstart.caches.cache_file import format
from headstart.caches.cache_file.format import StatePart
from headstart.caches.cache_file.writer import CacheWriter
from headstart.caches.entry import Entry, Fingerprint, Form, Retention
from headstart.caches.store import Store
from headstart.errors import CacheNotFound
from servers import Json, RunningServer, eventually, said

PROMPT = "You keep the lighthouse and never sleep. " * 8
TERMS: Json = {
    "ttl_seconds": 3600,
    "pinned": True,
    "description": "für die Küste",
    "metadata": {"team": "lights", "näme": "ü"},
}


def shown(server: RunningServer, name: str) -> Json:
    response = server.http.get(f"/v1/cache/toy/{name}")
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


def patch(server: RunningServer, name: str, **body: Any) -> Json:
    response = server.http.patch(f"/v1/cache/toy/{name}", json=body)
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


def kept(cache: Json) -> Json:
    return {name: cache[name] for name in TERMS}


def test_terms_are_shown_by_the_cache_and_the_list(toy: RunningServer) -> None:
    toy.create("terms-shown", PROMPT, **TERMS)
    cache = shown(toy, "terms-shown")
    assert kept(cache) == TERMS
    life = datetime.fromisoformat(cache["expires"]) - datetime.fromisoformat(cache["updated"])
    assert life.total_seconds() == 3600
    (listed,) = [
        one for one in toy.http.get("/v1/cache").json()["data"] if one["cache_name"] == "terms-shown"
    ]
    assert kept(listed) == TERMS
    assert listed["expires"] == cache["expires"]


def test_without_terms_a_cache_is_kept_for_ever_and_says_nothing(toy: RunningServer) -> None:
    toy.create("terms-none", PROMPT)
    cache = shown(toy, "terms-none")
    assert kept(cache) == {"ttl_seconds": None, "pinned": False, "description": "", "metadata": {}}
    assert cache["expires"] is None


def test_creating_again_without_terms_keeps_them(toy: RunningServer) -> None:
    toy.create("terms-again", PROMPT, **TERMS)
    toy.create("terms-again", "other " + PROMPT)
    assert kept(shown(toy, "terms-again")) == TERMS
    toy.create("terms-again", PROMPT, description="new", ttl_seconds=None)
    assert kept(shown(toy, "terms-again")) == TERMS | {"description": "new", "ttl_seconds": None}


def test_editing_changes_the_given_fields_alone(toy: RunningServer) -> None:
    toy.create("terms-edit", PROMPT, **TERMS)
    before = shown(toy, "terms-edit")
    answer = patch(toy, "terms-edit", description="new", metadata={})
    after = shown(toy, "terms-edit")
    assert after == before | {"description": "new", "metadata": {}}
    assert answer.items() <= after.items()
    assert after.keys() - answer.keys() == {"prompt", "would_hit", "miss_reason"}


def test_an_edit_keeps_version_and_state(toy: RunningServer) -> None:
    toy.create("terms-state", PROMPT)
    before = shown(toy, "terms-state")
    patch(toy, "terms-state", ttl_seconds=100, pinned=True)
    after = shown(toy, "terms-state")
    assert (after["version"], after["forms"]) == (before["version"], before["forms"])
    assert toy.chat("Hi", use_cache="terms-state")["usage"]["cache_hit"] is True
    again = toy.create("terms-state", PROMPT)
    assert (again["object"], again["version"], again["build_ms"]) == ("cache.updated", 2, 0)
    refused = toy.post("/v1/cache/toy", cache_name="terms-state", prompt=PROMPT, allow_overwrite=False)
    assert refused.status_code == 409


def test_null_takes_the_end_away(toy: RunningServer) -> None:
    toy.create("terms-null", PROMPT, ttl_seconds=60)
    assert patch(toy, "terms-null", ttl_seconds=None)["expires"] is None


def test_only_setting_the_end_makes_it_count_from_now(toy: RunningServer) -> None:
    toy.create("terms-from", PROMPT, ttl_seconds=60)
    before = shown(toy, "terms-from")["expires"]
    assert patch(toy, "terms-from", description="x")["expires"] == before
    assert patch(toy, "terms-from", ttl_seconds=60)["expires"] > before


def test_edits_survive_a_restart_and_the_loss_of_the_index(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("kept", PROMPT)
    # Longer than the room that the header has left.
    retention = TERMS | {"description": "d" * 1000, "metadata": {f"k{i}": "ü" * 900 for i in range(20)}}
    patch(server, "kept", **retention)
    server.stop()
    for index in server.cache_dir.glob("index.sqlite*"):
        index.unlink()
    server.start()
    assert kept(shown(server, "kept")) == retention
    assert server.chat("Hi", use_cache="kept")["usage"]["cache_hit"] is True


@pytest.mark.parametrize(
    "wrong",
    [
        {"ttl_seconds": 0},
        {"ttl_seconds": -1},
        {"ttl_seconds": 1e30},
        {"ttl_seconds": "soon"},
        {"pinned": "perhaps"},
        {"description": "x" * 1001},
        {"metadata": {f"k{i}": "v" for i in range(33)}},
        {"metadata": {"": "v"}},
        {"metadata": {"k": "v" * 1001}},
        {"metadata": {"k" * 65: "v"}},
        {"metadata": {"k": 1}},
        {"metadata": ["k"]},
    ],
    ids=str,
)
def test_wrong_terms_are_refused_by_name(toy: RunningServer, wrong: Json) -> None:
    toy.create("terms-wrong", PROMPT)
    (name,) = wrong
    created = toy.post("/v1/cache/toy", cache_name="terms-never", prompt=PROMPT, **wrong)
    edited = toy.http.patch("/v1/cache/toy/terms-wrong", json=wrong)
    for response in (created, edited):
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"].startswith(name)
    assert toy.http.get("/v1/cache/toy/terms-never").status_code == 404


def test_what_makes_a_cache_another_one_can_not_be_edited(toy: RunningServer) -> None:
    toy.create("terms-text", PROMPT)
    response = toy.http.patch("/v1/cache/toy/terms-text", json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


def test_editing_what_does_not_exist_is_404(toy: RunningServer) -> None:
    response = toy.http.patch("/v1/cache/toy/terms-absent", json={"pinned": True})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "cache_not_found")


def test_a_cache_whose_time_is_over_is_gone_with_its_file(toy: RunningServer) -> None:
    toy.create("terms-short", PROMPT, ttl_seconds=0.3)
    assert toy.chat("Hi", use_cache="terms-short")["usage"]["cache_hit"] is True
    eventually(lambda: toy.http.get("/v1/cache/toy/terms-short").status_code == 404, 2)
    assert "toy/terms-short.headstart" not in toy.files()
    chat = toy.post(
        "/v1/chat/completions",
        model="toy",
        use_cache="terms-short",
        messages=[{"role": "user", "content": "Hi"}],
    )
    assert (chat.status_code, chat.json()["error"]["code"]) == (404, "cache_not_found")
    assert toy.create("terms-short", PROMPT)["version"] == 1


def test_nobody_need_ask_for_a_file_to_go(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("over", PROMPT, ttl_seconds=0.2)
    eventually(lambda: server.files() == [], 15)


def test_a_cache_whose_time_is_over_at_the_start_goes(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("over", PROMPT, ttl_seconds=0.1)
    server.create("stays", PROMPT, ttl_seconds=500)
    server.restart()
    eventually(lambda: server.files() == ["toy/stays.headstart"], 5)


def test_edits_beside_chats_never_fail_or_change_an_answer(toy: RunningServer) -> None:
    toy.create("terms-busy", PROMPT)
    expected = said(toy.chat("Hi", use_cache="terms-busy"))
    done = threading.Event()
    failures: list[str] = []

    def edit() -> None:
        count = 0
        while not done.is_set():
            count += 1
            response = toy.http.patch("/v1/cache/toy/terms-busy", json={"description": str(count)})
            if response.status_code != 200:
                failures.append(response.text)

    editor = threading.Thread(target=edit)
    editor.start()
    try:
        answers = {said(toy.chat("Hi", use_cache="terms-busy")) for _ in range(30)}
    finally:
        done.set()
        editor.join()
    assert answers == {expected}
    assert failures == []
    assert shown(toy, "terms-busy")["version"] == 1


def test_edits_at_the_same_time_all_count(toy: RunningServer) -> None:
    toy.create("terms-race", PROMPT)
    given: list[dict[str, Any]] = [
        {"description": "d"},
        {"pinned": True},
        {"metadata": {"a": "b"}},
        {"ttl_seconds": 99},
    ]
    threads = [threading.Thread(target=patch, args=(toy, "terms-race"), kwargs=one) for one in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache = shown(toy, "terms-race")
    assert kept(cache) == {"description": "d", "pinned": True, "metadata": {"a": "b"}, "ttl_seconds": 99}


def test_hits_tell_what_they_saved(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=1")
    server.create("saves", PROMPT)
    cold = shown(server, "saves")
    assert (cold["tokens_saved"], cold["seconds_saved"]) == (0, 0)
    cached = server.chat("Hi", use_cache="saves")["usage"]["prompt_tokens_details"]["cached_tokens"]
    server.chat("Hi", use_cache="saves")
    eventually(lambda: shown(server, "saves")["hits"] == 2)
    server.restart()
    warm = shown(server, "saves")
    assert warm["tokens_saved"] == 2 * cached
    assert 0.001 * cached < warm["seconds_saved"] < 0.02 * cached


# With a clock of the test's own.

ENTRY = Entry("toy", "one", "text", 1, 1000.0, 1000.0, Fingerprint("w", "e", {}, "t"), {}, 1.0, 2.0)
DAY = 86400.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def _stored(store: Store, entry: Entry, state: bytes = b"state") -> Entry:
    source = store.directory / "state"
    source.write_bytes(state)
    forms: dict[Form, StatePart] = {"chat": StatePart([1, 2], source, 0, len(state))}
    with store.scratch(entry.namespace) as path:
        writer = CacheWriter(path, entry, {form: part.tokens for form, part in forms.items()})
        for form, part in forms.items():
            writer.copy(form, part)
        return await store.put(writer, entry)


async def test_a_clock_that_is_set_back_ends_nothing(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(tmp_path / "cache", clock)
    await _stored(store, replace(ENTRY, retention=Retention(ttl_seconds=60)))
    clock.now = -DAY * 365
    store.remove_expired()
    assert store.find(cache_key("toy", "one"))
    clock.now = 1059.0
    assert store.find(cache_key("toy", "one"))


async def test_a_clock_that_is_set_forward_ends_what_is_over(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(tmp_path / "cache", clock)
    await _stored(store, replace(ENTRY, retention=Retention(ttl_seconds=60)))
    clock.now += 60
    with pytest.raises(CacheNotFound):
        store.find(cache_key("toy", "one"))
    assert not store.path(cache_key("toy", "one")).exists()


async def test_a_file_is_not_taken_away_from_a_build_that_reads_it(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(tmp_path / "cache", clock)
    await _stored(store, replace(ENTRY, retention=Retention(ttl_seconds=60)))
    store.use(cache_key("toy", "one"))
    clock.now += 60
    store.remove_expired()
    with pytest.raises(CacheNotFound):
        store.find(cache_key("toy", "one"))
    assert store.path(cache_key("toy", "one")).exists()


LONG = {f"key-{i}": "long " * 200 for i in range(10)}


@pytest.mark.parametrize("retention", [Retention(description="short"), Retention(metadata=LONG)])
async def test_whoever_reads_the_old_file_goes_on(tmp_path: Path, retention: Retention) -> None:
    store = Store(tmp_path / "cache")
    state = bytes(range(256)) * 50_000
    entry = await _stored(store, ENTRY, state)
    path = store.path(cache_key("toy", "one"))
    with path.open("rb") as reader:
        before = path.read_bytes()
        changed = await store.amend(entry, replace(entry, retention=retention))
        assert reader.read() == before
    assert changed
    assert changed.retention == retention
    assert format.read(path) == changed
    assert format.verify(path, changed.identity) == {"chat": [1, 2]}
    form = changed.forms["chat"]
    assert path.read_bytes()[form.state_offset :][: form.state_bytes] == state


async def test_damage_to_a_state_is_not_hidden_by_an_edit(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    entry = await _stored(store, ENTRY, b"x" * 1000)
    path = store.path(cache_key("toy", "one"))
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    entry = store.find(cache_key("toy", "one"))
    changed = await store.amend(entry, replace(entry, retention=Retention(pinned=True)))
    assert changed
    with pytest.raises(format.Corrupt):
        format.verify(path, changed.identity)


async def test_an_edit_of_a_file_without_a_readable_header_keeps_the_text(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    await _stored(store, ENTRY)
    path = store.path(cache_key("toy", "one"))
    path.write_bytes(b"rubbish" * 100)
    entry = store.find(cache_key("toy", "one"))
    changed = await store.amend(entry, replace(entry, retention=Retention(pinned=True)))
    assert changed
    assert (changed.prompt, changed.retention.pinned, changed.evicted) == ("text", True, ["chat"])
    assert format.read(path) == changed


async def test_a_cache_that_was_replaced_meanwhile_is_not_amended(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    old = await _stored(store, ENTRY)
    new = await _stored(store, replace(ENTRY, prompt="new"))
    assert await store.amend(old, replace(old, retention=Retention(pinned=True))) is None
    assert store.find(cache_key("toy", "one")) == new
