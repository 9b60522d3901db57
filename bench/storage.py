"""Arm k: how fast states come from their files."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from time import perf_counter

from bench.client import CHAT, BenchFailed, Reply
from bench.lab import QUESTION_TOKENS, Lab, connect
from bench.servers import SINGLE, Headstart, Server, check_hit
from bench.texts import Prompt
from headstart.caches.cache_file.format import read, verify


def speed(lab: Lab) -> None:
    """(k) How fast a state comes from a file in the page cache: `restore_gb_s` where it was verified before,
    `verified_gb_s` on the first hit after a restart, where the file is hashed first. Hashing is timed in this
    process, by the server's own function."""
    prompt = lab.prompt()
    lab.stop()
    if Headstart.name not in lab.contenders:
        return
    with lab.server(Headstart.name, SINGLE) as server:
        server.keep(prompt)
    for number, name in lab.turns([Headstart.name], short=4, full=10):
        with lab.server(name, SINGLE) as server:
            first = _hit(lab, server, prompt)
            hash_ms = hashing_ms(_file(server.states, prompt))
            megabytes = _state_mb(server, prompt)
            restore_ms = median(_restored_again(lab, server, prompt) for _ in range(3))
            lab.record(
                "k",
                name,
                number,
                state_mb=megabytes,
                hash_ms=hash_ms,
                first_restore_ms=first.timings["restore_ms"],
                restore_ms=restore_ms,
                verified_gb_s=megabytes / (hash_ms + first.timings["restore_ms"]),
                restore_gb_s=megabytes / restore_ms,
            )


def _restored_again(lab: Lab, server: Server, prompt: Prompt) -> float:
    server.evict()
    return float(_hit(lab, server, prompt).timings["restore_ms"])


def hashing_ms(path: Path) -> float:
    identity = read(path).identity
    started = perf_counter()
    verify(path, identity)
    return 1000 * (perf_counter() - started)


def _hit(lab: Lab, server: Server, prompt: Prompt) -> Reply:
    question = lab.writer.question(QUESTION_TOKENS)
    with connect(server) as connection:
        reply = connection.ask(CHAT, server.hit(prompt, question) | {"max_tokens": 1})
    check_hit(reply, prompt, "file")
    return reply


def _file(states: Path, prompt: Prompt) -> Path:
    found = [*states.rglob(f"{prompt.name}.headstart")]
    if len(found) != 1:
        raise BenchFailed(f"{len(found)} files of the cache {prompt.name}")
    return found[0]


def _state_mb(server: Server, prompt: Prompt) -> float:
    assert isinstance(server, Headstart)
    with connect(server) as connection:
        cache = connection.call("GET", f"/v1/cache/{server.model}/{prompt.name}")
    return float(cache["forms"]["chat"]["size_mb"])
