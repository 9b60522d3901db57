"""Keys of caches, from the names that tests write."""

from __future__ import annotations

from headstart.names import CacheKey, Namespace


def cache_key(folder: str, name: str) -> CacheKey:
    return CacheKey(Namespace(folder), name)
