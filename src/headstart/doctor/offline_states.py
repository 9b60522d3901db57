"""Empties the state store of a directory without a server."""

from __future__ import annotations

import os

from headstart.caches.files import storage_errors, take_lock
from headstart.config.settings import Settings
from headstart.engine.states.directory import clear
from headstart.errors import StartupError
from headstart.service.models.state_limits import held, states_directory


def clear_states(settings: Settings, model: str | None) -> int:
    """Deletes all states kept without a name, of all models or of one; returns the bytes freed. Raises
    StartupError if there is no cache directory or a server uses it, or StorageError."""
    if not settings.cache_dir.is_dir():
        raise StartupError(f"There is neither a server nor a cache directory {settings.cache_dir}.")
    names = [name for name in held(settings.cache_dir) if model in (None, name)]
    with storage_errors(f"the cache directory {settings.cache_dir}"):
        lock = take_lock(settings.cache_dir.absolute())
        try:
            removed = [clear(states_directory(settings.cache_dir) / name, None) for name in names]
        finally:
            os.close(lock)
    if any(each.in_use for each in removed):
        raise StartupError("A server that was just stopped still writes; try again in a few seconds.")
    return sum(each.n_bytes for each in removed)
