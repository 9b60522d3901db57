"""Small caches in a store, without an engine."""

from __future__ import annotations

from blake3 import blake3

from headstart.caches.cache_file.writer import CacheWriter
from headstart.caches.entry import Entry, Fingerprint
from headstart.caches.store import Store
from headstart.names import Namespace


async def put_small(store: Store, name: str, prompt: str, repaired: Entry | None = None) -> Entry:
    """Stores a cache of three tokens; as a repair of the `repaired` one, if there is one."""
    fingerprint = Fingerprint("w", "e", {}, "t")
    entry = Entry("toy", name, prompt, 1, 10.0, 20.0, fingerprint, {}, 1.0, 2.0)
    with store.scratch(Namespace("toy")) as path:
        writer = CacheWriter(path, entry, {"chat": [1, 2, 3]})
        state = f"state of {name}".encode()
        with path.open("r+b") as output:
            output.seek(writer.end)
            output.write(state)
        writer.wrote("chat", len(state), blake3(state).hexdigest())
        return await store.put(writer, entry, repaired)
