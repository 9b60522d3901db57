"""Cache files whose headers are not what they should be, with hashes that fit or don't: imported, and put
into the cache directory."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from struct import pack, unpack_from
from typing import Any

from blake3 import blake3
from hypothesis import strategies as st

from fuzz import hostile, wire
from fuzz.victim import Refused, Victim

Json = dict[str, Any]

NO_HASH = "0" * 64
WAYS = ("import", "rebuild", "drop")
DEEP = {"$raw": [["[", 200_000]]}


def _known(**more: Any) -> Json:
    return {"kind": "headers", "way": "drop", **more}


MESSAGES: list[Any] = [
    [{"unfinished": True}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": {"$raw": [["[", 400], ["]", 400]]}}],
]
KNOWN: list[Json] = [
    *(_known(header=[[[], DEEP]], way=way) for way in WAYS),
    *(_known(header=[[["a"], {"$raw": [["[", 200_000], ["]", 200_000]]}]], way=way) for way in WAYS),
    *(_known(entry=[[["messages"], each], [["prompt"], ""]], way=way) for each in MESSAGES for way in WAYS),
    *(_known(entry=[[["tools"], [{"type": "function"}]]], way=way) for way in WAYS),
    *(_known(entry=[[["terms", "description"], {"$repeated": ["x", 2 << 20]}]], way=way) for way in WAYS),
    *(_known(entry=[[["terms", "ttl_seconds"], 1e308]], way=way) for way in WAYS),
    *(_known(entry=[[["updated"], {"$raw": [["NaN", 1]]}]], way=way) for way in WAYS),
    *(
        _known(header=[[["chat.tokens", "shape"], shape]])
        for shape in ([], [-1], ["x"], [1e300], None, [[1]])
    ),
    *(
        _known(header=[[["chat.state", "data_offsets"], each]])
        for each in ([0], [-1, 5], [5, 0], "ab", [0, 2**70])
    ),
    *(_known(header=[[["chat.tokens", "dtype"], each]]) for each in (None, 5, "F64")),
    *(_known(length=n) for n in (0, 1, 2**26, 2**26 + 1, 2**63, 2**64 - 1)),
    *(_known(cut=n) for n in (0, 4, 8, 9, 500)),
]


def recipes() -> st.SearchStrategy[Json]:
    paths = [
        ["prompt"],
        ["messages"],
        ["tools"],
        ["owner"],
        ["name"],
        ["model"],
        ["terms"],
        ["terms", "metadata"],
    ]
    paths += [
        ["terms", "ttl_seconds"],
        ["terms", "pinned"],
        ["terms", "description"],
        ["version"],
        ["created"],
    ]
    paths += [
        ["updated"],
        ["origin"],
        ["parts"],
        ["evicted"],
        ["fingerprint"],
        ["fingerprint", "settings"],
        ["x"],
    ]
    paths += [["build_ms"], ["ttft_ms"], ["prefill_ms"], ["forms"], ["identity"], []]
    tensors = [
        [name, field]
        for name in ("chat.tokens", "chat.state")
        for field in ("dtype", "shape", "data_offsets")
    ]
    places = [
        ["__metadata__"],
        ["__metadata__", "format"],
        ["__metadata__", "blake3"],
        ["__metadata__", "entry"],
    ]
    places += [*tensors, ["chat.tokens"], ["chat.state"], ["completion.tokens"], ["x"], ["x.tokens"], []]
    places += [["__metadata__", "bytes chat.state"], ["__metadata__", "blake3 chat.state"]]
    return st.fixed_dictionaries(
        {"kind": st.just("headers"), "way": st.sampled_from(WAYS)},
        optional={
            "entry": st.lists(st.tuples(st.sampled_from(paths), hostile.values()).map(list), max_size=3),
            "header": st.lists(st.tuples(st.sampled_from(places), hostile.values()).map(list), max_size=2),
            "hash": st.booleans(),
            "length": st.integers(0, 2**64 - 1),
            "cut": st.integers(0, 3000),
            "flips": st.lists(st.tuples(st.integers(0, 2500), st.integers(1, 255)).map(list), max_size=3),
        },
    )


def attack(victim: Victim, recipe: Json) -> None:
    content = built(_original(victim), recipe)
    with contextlib.suppress(Refused):
        if recipe["way"] == "drop":
            _drop(victim, content)
        else:
            query = "?rebuild=true" if recipe["way"] == "rebuild" else ""
            victim.send("PUT", f"/v1/cache/toy/attack/file{query}", content)
            _look(victim)
            victim.send("DELETE", "/v1/cache/toy/attack")


def _original(victim: Victim) -> bytes:
    path = victim.server.cache_dir / "toy" / "original.headstart"
    if not path.exists():
        victim.server.create("original", "You keep the lighthouse. " * 10)
    return path.read_bytes()


def built(original: bytes, recipe: Json) -> bytes:
    (length,) = unpack_from("<Q", original)
    header = json.loads(original[8 : 8 + length])
    entry: Any = json.loads(header["__metadata__"]["entry"])
    # So that what is put into the directory is taken for the cache of its name.
    entry = {**entry, "name": "attack"}
    for path, value in recipe.get("entry", []):
        entry = wire.replaced(entry, path, value)
    header["__metadata__"] |= {"entry": wire.text(entry), "blake3": NO_HASH}
    for path, value in recipe.get("header", []):
        header = wire.replaced(header, path, value)
    text = wire.encoded(header)
    if recipe.get("hash", True):
        text = text.replace(NO_HASH.encode(), blake3(text).hexdigest().encode(), 1)
    content = bytearray(pack("<Q", recipe.get("length", len(text))) + text + original[8 + length :])
    for place, bits in recipe.get("flips", []):
        content[place % len(content)] ^= bits
    return bytes(content[: recipe["cut"]] if "cut" in recipe else content)


def _drop(victim: Victim, content: bytes) -> None:
    path = Path(victim.server.cache_dir) / "toy" / "attack.headstart"
    path.write_bytes(content)
    try:
        _look(victim)
        victim.send("POST", "/v1/verify", b'{"repair": true, "remove_unreadable": true}')
        _look(victim)
        victim.send("DELETE", "/v1/cache/toy/attack")
    finally:
        path.unlink(missing_ok=True)


def _look(victim: Victim) -> None:
    for path in ("/v1/cache", "/v1/cache/toy", "/v1/cache/toy/attack", "/v1/models"):
        response = victim.send("GET", path)
        assert path == "/v1/cache/toy/attack" or response.status_code == 200, path
    chat = {"model": "toy", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    victim.send("POST", "/v1/chat/completions", json.dumps(chat | {"use_cache": "attack"}).encode())
    victim.send("GET", "/v1/cache/toy/attack/file")
