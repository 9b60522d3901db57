"""Resolves a name in a request to a model and a cache: `model`, an alias, or `model@cache`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from headstart.caches.entry import Entry


def split(name: str, aliases: Mapping[str, str]) -> tuple[str, str | None]:
    """The model and the cache, or None if no cache is named. A cache in the name itself takes precedence over
    its alias's. Neither need exist."""
    alias, at, cache = name.partition("@")
    model, has_own, own = aliases.get(alias, alias).partition("@")
    if at:
        return model, cache
    return model, own if has_own else None


def choices(entries: Iterable[Entry]) -> list[str]:
    """The `model@cache` names by which clients choose caches as models: those of client-created and declared
    caches."""
    return [f"{entry.model}@{entry.name}" for entry in entries if entry.origin in ("client", "declared")]
