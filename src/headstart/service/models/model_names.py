"""Which model and cache the name in a request means: `model`, an alias, or `model@cache`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from headstart.caches.entry import Entry


def split(name: str, aliases: Mapping[str, str]) -> tuple[str, str | None]:
    """The model and the cache, None where none is named. One that the name itself has wins over its alias's;
    neither need exist."""
    alias, at, cache = name.partition("@")
    model, has_own, own = aliases.get(alias, alias).partition("@")
    if at:
        return model, cache
    return model, own if has_own else None


def choices(entries: Iterable[Entry]) -> list[str]:
    """The names under which a client can choose caches as if they were models: those that people made."""
    return [f"{entry.model}@{entry.name}" for entry in entries if entry.origin in ("client", "declared")]
