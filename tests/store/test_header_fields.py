"""Every field of a header, of any type and in any range, with a right hash: damage, or a cache that works."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import Report, StartServer
from headers import changed, header_of, with_header
from headstart.caches.cache_file import format
from headstart.caches.cache_file.entry_checks import checked
from headstart.caches.cache_file.format import Corrupt
from headstart.caches.cache_file.header import NO_HASH
from servers import Json, RunningServer, said
from sweeps import rounds, swept

PROMPT = "You keep the lighthouse and never sleep. " * 8
CALL = {"type": "function", "function": {"name": "look", "arguments": {"far": True}}}
# Clocks show the years 1 to 9999.
FIRST_YEAR = -62_135_596_800
MESSAGES = [
    {"role": "system", "content": PROMPT},
    {"role": "user", "content": "Who?", "name": "ann"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "nobody", "tool_call_id": "1"},
]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
GONE = object()
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        1.0,
        0.5,
        -0.0,
        1e308,
        -1e308,
        10**30,
        -(10**30),
        1 << 31,
        1 << 62,
        1 << 63,
    ),
    *(float("nan"), float("inf"), "", "x", "1", "\0", "\ud800", "x" * 100_000, "../../x", "toy"),
    *([], {}, [0], [0, 0], [1, 2, 3], [[]], {"a": 1}, {"": {}}, ["chat"], ["chat", "chat"], "blake3", GONE),
]
ENTRY = "entry"


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything in the header, that of its entry included."""
    if path:
        yield path
    if path == ("__metadata__", ENTRY):
        value = json.loads(value)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The value with another one at a place of it."""
    if not path:
        return new
    if isinstance(value, str):
        return json.dumps(_put(json.loads(value), path, new))
    copy = value.copy()
    if new is GONE and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = _put(copy[path[0]], path[1:], new)
    return copy


def mutated(whole: bytes, path: tuple[Any, ...], new: Any) -> bytes:
    return changed(whole, lambda header: _replace(header, _put(header, path, new)))


def _replace(header: Json, other: Json) -> None:
    header.clear()
    header.update(other)


@pytest.fixture(scope="module")
def wholes(toy: RunningServer) -> list[bytes]:
    """A file with a prompt in both forms, and one with all that messages may have."""
    toy.create("fields-prompt", PROMPT, ttl_seconds=1e6, metadata={"a": "b"}, description="d")
    body = {"cache_name": "fields-messages", "messages": MESSAGES, "tools": TOOLS}
    assert toy.post("/v1/cache/toy", **body).status_code == 200
    return [
        (toy.cache_dir / "toy" / f"fields-{name}.headstart").read_bytes() for name in ("prompt", "messages")
    ]


def holds(path: Path) -> bool:
    """Whether the file is taken for a cache; then all of it is as it should be."""
    try:
        entry = format.read(path)
        format.verify(path, entry.identity)
    except Corrupt as error:
        told = str(error)
    else:
        told = ""
    if told:
        assert path.name in told
        return False
    assert checked(entry.content) == entry.content
    size = path.stat().st_size
    for form in entry.forms.values():
        assert form.n_tokens > 0
        assert 0 < form.state_offset < form.state_offset + form.state_bytes <= size
    assert FIRST_YEAR <= entry.created < 1e12
    assert FIRST_YEAR <= entry.updated < 1e12
    json.dumps([entry.name, entry.owner, entry.n_tokens, entry.ms_per_token, entry.cost_ms, entry.expires])
    return True


@pytest.mark.sweep
def test_each_field_with_each_value_is_damage_or_a_cache_that_works(
    wholes: list[bytes], tmp_path: Path, report: Report
) -> None:
    path = tmp_path / "bad.headstart"
    counts = {True: 0, False: 0}
    cases = [(whole, place, new) for whole in wholes for place in _places(header_of(whole)) for new in VALUES]
    for whole, place, new in swept(cases):
        path.write_bytes(mutated(whole, place, new))
        counts[holds(path)] += 1
    report(f"{sum(counts.values())} headers: {counts[False]} damaged, {counts[True]} as they should be")
    assert counts[False] > counts[True] > 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.sweep
@pytest.mark.slow
def test_any_json_in_any_place_is_damage_or_a_cache_that_works(wholes: list[bytes], tmp_path: Path) -> None:
    places = [(whole, place) for whole in wholes for place in _places(header_of(whole))]
    path = tmp_path / "bad.headstart"

    @settings(max_examples=rounds(4000), deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(places), JSON)
    def look(at: tuple[bytes, tuple[Any, ...]], new: Any) -> None:
        path.write_bytes(mutated(*at, new))
        holds(path)

    look()


@pytest.mark.sweep
@pytest.mark.slow
def test_any_bytes_as_a_header_are_damage(wholes: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "bad.headstart"

    @settings(max_examples=rounds(2000), deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
    def look(text: bytes) -> None:
        path.write_bytes(with_header(wholes[0], text))
        assert not holds(path)

    look()


def test_a_key_that_is_there_twice_is_damage(wholes: list[bytes], tmp_path: Path) -> None:
    """Others would take the first of them."""
    path = tmp_path / "bad.headstart"
    header = header_of(wholes[0])
    header["__metadata__"]["blake3"] = NO_HASH
    tensor = json.dumps(header["chat.state"])
    text = json.dumps(header).replace('"chat.state":', f'"chat.state": {tensor}, "chat.state":', 1)
    path.write_bytes(with_header(wholes[0], text.encode()))
    assert not holds(path)


def test_a_header_in_another_encoding_is_damage(wholes: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "bad.headstart"
    text = json.dumps(header_of(wholes[0]))
    for encoding in ("utf-16", "utf-32-le", "utf-8-sig"):
        path.write_bytes(with_header(wholes[0], text.encode(encoding)))
        assert not holds(path)


@pytest.mark.slow
@pytest.mark.sweep
def test_no_header_in_the_directory_fails_another_request(
    start_server: StartServer, wholes: list[bytes]
) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("good", "Another keeper, of another lighthouse. " * 8)
    expected = said(server.chat("Who?", use_cache="good"))
    cases = [(whole, place, new) for whole in wholes for place in _places(header_of(whole)) for new in VALUES]
    path = server.cache_dir / "toy" / "fields-prompt.headstart"
    cases = swept(cases)[::8]
    for n, (whole, place, new) in enumerate(cases):
        name = json.loads(header_of(whole)["__metadata__"][ENTRY])["name"]
        path = server.cache_dir / "toy" / f"{name}.headstart"
        path.write_bytes(mutated(whole, place, new))
        for call in (
            server.http.get("/v1/cache"),
            server.http.get("/v1/cache/toy/good"),
            server.post("/v1/verify"),
            server.post("/v1/chat/completions", model="toy", messages=MESSAGES, max_tokens=1, tools=TOOLS),
        ):
            assert call.status_code == 200, (place, new, call.text)
        named = server.post(
            "/v1/chat/completions", model="toy", messages=MESSAGES[:1], use_cache=name, max_tokens=1
        )
        # A text may be valid and longer than the model's context.
        too_long = named.status_code == 400 and named.json()["error"]["code"] == "context_length_exceeded"
        assert named.status_code in (200, 404) or too_long, (place, new, named.text)
        assert server.http.get(f"/v1/cache/toy/{name}").status_code in (200, 404)
        assert said(server.chat("Who?", use_cache="good")) == expected
        if n % 50 == 0:
            server.restart()
        path.unlink(missing_ok=True)
        server.http.get("/v1/cache")
    assert len(server.workers()) >= 1
