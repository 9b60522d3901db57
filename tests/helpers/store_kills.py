"""Kills processes that work on a store: `python store_kills.py DIRECTORY ROUNDS SEED`.

In each round a child opens the store and creates, replaces, evicts and deletes caches until it is killed, at
a random moment; then the store is opened again and must hold what the child had reported as done. The last
line printed says how many kills hit what. A program of its own, since it forks and so must not have threads.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from itertools import islice
from pathlib import Path

from blake3 import blake3

from cache_keys import cache_key
from headstart.caches.cache_file import format
from headstart.caches.cache_file.writer import CacheWriter
from headstart.caches.entry import Entry, Fingerprint
from headstart.caches.store import Store
from headstart.engine.core import state_file
from headstart.names import Namespace
from headstart.protocol import SaveTo
from ledger import NAMES, Ledger

NAMESPACE = "toy"
# A kill comes after so many reports at most, and so long after the last of them.
MOST_REPORTS = 24
LONGEST_SECONDS = 0.004


def _content(name: str, version: int) -> tuple[Entry, list[int], bytes]:
    """A cache's entry, tokens and state, all made from its name and version."""
    seed = blake3(f"{name} {version}".encode())
    state = seed.digest(length=1000 + 40_000 * (version % 4))
    fingerprint = Fingerprint("w", "e", {}, "t")
    entry = Entry(NAMESPACE, name, f"{name} {version}", version, 1.0, 2.0, fingerprint, {}, 1.0, 2.0)
    return entry, list(seed.digest(length=50)), state


async def _write(store: Store, name: str, version: int) -> None:
    entry, tokens, state = _content(name, version)
    with store.scratch(Namespace(NAMESPACE)) as path:
        writer = CacheWriter(path, entry, {"chat": tokens})
        saved = state_file.write(SaveTo(str(path), writer.end), memoryview(state))
        writer.wrote("chat", len(state), saved)
        await store.put(writer, entry)


async def _delete(store: Store, name: str, _: int) -> None:
    store.delete(cache_key(NAMESPACE, name))


async def _evict(store: Store, name: str, _: int) -> None:
    entry = store.find(cache_key(NAMESPACE, name))
    assert await store.amend(entry, entry.without_states(), with_states=False)


# What is done with a cache: whether there must be one before, whether there is one after, and how.
OPERATIONS: dict[str, tuple[bool, bool, Callable[[Store, str, int], Awaitable[None]]]] = {
    "create": (False, True, _write),
    "replace": (True, True, _write),
    "delete": (True, False, _delete),
    "evict": (True, True, _evict),
}


async def _work(directory: Path, there: dict[str, int], version: int, tell: int, seed: int) -> None:
    """Operations without an end, each told before and after."""
    rng = random.Random(seed)
    store = Store(directory)
    while True:
        version += 1
        name = rng.choice(NAMES)
        possible = [what for what, (before, _, _) in OPERATIONS.items() if before == (name in there)]
        what = rng.choice(possible)
        _, after, run = OPERATIONS[what]
        # Evicting leaves the version that there is.
        left = there[name] if what == "evict" else version
        os.write(tell, json.dumps([what, name, left if after else None]).encode() + b"\n")
        await run(store, name, version)
        os.write(tell, b"[]\n")
        there.pop(name, None)
        if after:
            there[name] = left


def _killed_child(directory: Path, ledger: Ledger, version: int, seed: int) -> None:
    hear, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(hear)
        there = {name: kept for name, kept in ledger.kept.items() if kept is not None}
        asyncio.run(_work(directory, there, version, tell, seed))
        os._exit(1)
    os.close(tell)
    rng = random.Random(seed)
    with os.fdopen(hear) as reports:
        heard = list(islice(reports, rng.randrange(MOST_REPORTS)))
        time.sleep(rng.uniform(0, LONGEST_SECONDS))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child ended by itself"
        for report in map(json.loads, [*heard, *reports]):
            if report:
                ledger.begin(*report)
            else:
                ledger.done()


def _check(directory: Path, ledger: Ledger) -> None:
    ledger.counts["temporary files left"] += len(list(directory.rglob(".tmp-*")))
    store = Store(directory)
    found: dict[str, int | None] = dict.fromkeys(NAMES)
    for entry in store.entries():
        wanted, tokens, state = _content(entry.name, entry.version)
        path = store.path(cache_key(NAMESPACE, entry.name))
        assert entry.prompt == wanted.prompt
        found[entry.name] = entry.version
        if entry.evicted:
            assert (entry.forms, format.verify(path, entry.identity)) == ({}, {})
            continue
        assert format.verify(path, entry.identity) == {"chat": tokens}
        form = entry.forms["chat"]
        assert path.read_bytes()[form.state_offset :] == state
    store.close()
    kept = {name for name, version in found.items() if version is not None}
    assert {path.name for path in directory.glob(f"{NAMESPACE}/*")} == {f"{name}.headstart" for name in kept}
    assert {path.name for path in directory.glob(f".headers/{NAMESPACE}/*")} == {
        f"{name}.header" for name in kept
    }
    ledger.settle(found)


def main(directory: Path, rounds: int, seed: int) -> None:
    ledger = Ledger()
    for number in range(rounds):
        _killed_child(directory, ledger, 1000 * number, seed + number)
        _check(directory, ledger)
        ledger.counts["rounds"] += 1
    print(json.dumps(ledger.counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
