"""The states whose hashes were checked since the start, with the identities of their files at that time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headstart.caches.cache_file.sidecar import state_path
from headstart.caches.entry import Entry, Form, Identity
from headstart.caches.files import identity_at
from headstart.names import CacheKey, Namespace
from headstart.protocol import StateRef

Tokens = list[int]
# Identities of a cache file (None) and of its sidecar files; None if there is no file.
Identities = dict[Form | None, Identity | None]


@dataclass(frozen=True)
class VerifiedState:
    """A form whose hashes were checked: its token ids, and where the engine finds the state."""

    tokens: list[int]
    ref: StateRef


def identities(path: Path, entry: Entry) -> Identities:
    """The current identities of a cache's files; `path` is the cache file."""
    found: Identities = {None: identity_at(path)}
    found |= {form: identity_at(state_path(path, form)) for form in entry.sidecar_forms}
    return found


class Checked:
    """Checked states by key."""

    def __init__(self) -> None:
        self._known: dict[CacheKey, tuple[Identities, dict[Form, Tokens]]] = {}

    def put(self, key: CacheKey, files: Identities, tokens: dict[Form, Tokens]) -> None:
        self._known[key] = files, tokens

    def get(self, key: CacheKey, files: Identities) -> dict[Form, Tokens] | None:
        """The token ids found in these very files, or None."""
        known, tokens = self._known.get(key, (None, {}))
        return tokens if known == files else None

    def forget(self, key: CacheKey) -> None:
        self._known.pop(key, None)

    def tokens(self, namespace: Namespace, form: Form) -> Iterator[Tokens]:
        for key, (_, tokens) in self._known.items():
            if key.namespace == namespace and form in tokens:
                yield tokens[form]
