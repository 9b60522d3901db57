"""Damage at any place of a file, under a running server: never a crash, never another text."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from conftest import Report, StartServer
from servers import WITHOUT_STORE, RunningServer, said

PROMPT = "You keep the lighthouse.\n\n" + "Each evening you light the lamp. " * 6
FLIPS = 300
CUTS = 60


def _keeper(start_server: StartServer) -> tuple[RunningServer, Path, str]:
    """One slot, so that what another chat leaves in it makes the file be read."""
    server = start_server("--model", "toy=toy:", "--slots", "1", env=WITHOUT_STORE)
    expected = said(server.chat("Who?", system=PROMPT, cache_prompt=False))
    server.create("keeper", PROMPT)
    return server, server.cache_dir / "toy" / "keeper.headstart", expected


def _check(server: RunningServer, expected: str, counts: Counter[str]) -> None:
    """The next answer is right, and the one after it a hit from a healed file."""
    first = server.chat("Who?", use_cache="keeper")
    counts[first["usage"].get("cache_miss_reason", "hit")] += 1
    assert said(first) == expected
    server.chat("something else", max_tokens=1)
    second = server.chat("Who?", use_cache="keeper")
    assert said(second) == expected
    assert second["usage"]["cache_hit"] is True
    assert second["timings"]["cache_source"] == "file"


@pytest.mark.slow
def test_a_flipped_bit_at_any_place_never_changes_an_answer(
    start_server: StartServer, report: Report
) -> None:
    server, path, expected = _keeper(start_server)
    rng = random.Random(3)
    counts: Counter[str] = Counter()
    for _ in range(FLIPS):
        damaged = bytearray(path.read_bytes())
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        _check(server, expected, counts)
    report(f"{FLIPS} flipped bits in {path.stat().st_size} bytes: {dict(counts)}")
    assert counts["corrupt"] == FLIPS


@pytest.mark.slow
def test_a_file_cut_at_any_place_never_changes_an_answer(start_server: StartServer, report: Report) -> None:
    server, path, expected = _keeper(start_server)
    rng = random.Random(4)
    counts: Counter[str] = Counter()
    for _ in range(CUTS):
        whole = path.read_bytes()
        path.write_bytes(whole[: rng.randrange(len(whole))])
        _check(server, expected, counts)
    report(f"{CUTS} cuts: {dict(counts)}")
    assert counts["corrupt"] == CUTS


def test_a_file_exchanged_for_anything_never_changes_an_answer(start_server: StartServer) -> None:
    server, path, expected = _keeper(start_server)
    counts: Counter[str] = Counter()
    whole = path.read_bytes()
    rubbish = [b"", b"\0", b"\xff" * 8, b"\xff" * 5000, b"{}" * 4000, whole + b"\0", whole[::-1], whole * 2]
    length = int.from_bytes(whole[:8], "little")
    rubbish += [(length + n).to_bytes(8, "little") + whole[8:] for n in (-1, 1, 64, len(whole))]
    for content in rubbish:
        path.write_bytes(content)
        _check(server, expected, counts)
    assert counts["corrupt"] == len(rubbish)


def test_damage_found_at_a_start_never_changes_an_answer(start_server: StartServer) -> None:
    server, path, expected = _keeper(start_server)
    rng = random.Random(5)
    for _ in range(4):
        server.stop()
        damaged = bytearray(path.read_bytes())
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        server.start()
        _check(server, expected, Counter())


@pytest.mark.parametrize("where", ["start", "middle", "all"])
def test_a_damaged_index_costs_no_cache(start_server: StartServer, where: str) -> None:
    server, _, expected = _keeper(start_server)
    for i in range(40):
        server.create(f"more{i}", f"{i} {PROMPT}")
    server.stop()
    index = server.cache_dir / "index.sqlite"
    data = bytearray(index.read_bytes())
    size = len(data)
    begin, end = {"start": (0, 200), "middle": (4096, size // 2), "all": (0, size)}[where]
    data[begin:end] = random.Random(6).randbytes(end - begin)
    index.write_bytes(data)
    server.start()
    answer = server.chat("Who?", use_cache="keeper")
    assert answer["usage"]["cache_hit"] is True
    assert said(answer) == expected
    assert len(server.http.get("/v1/cache").json()["data"]) == 41


def test_an_index_that_breaks_under_a_running_server_breaks_no_request(start_server: StartServer) -> None:
    server, _, expected = _keeper(start_server)
    with sqlite3.connect(server.cache_dir / "index.sqlite") as other:
        other.execute("DROP TABLE records")
    answer = server.chat("Who?", use_cache="keeper")
    assert said(answer) == expected
    server.create("another", PROMPT)
    assert server.http.get("/v1/cache/toy/another").status_code == 200
    assert len(server.http.get("/v1/cache").json()["data"]) == 2
    assert server.http.delete("/v1/cache/toy/another").status_code == 200
    server.restart()
    assert server.chat("Who?", use_cache="keeper")["usage"]["cache_hit"] is True
