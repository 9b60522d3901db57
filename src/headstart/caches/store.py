"""The cache directory: finds, writes, verifies and deletes caches."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import time

from headstart.caches.cache_file import format, sidecar
from headstart.caches.cache_file.format import Corrupt
from headstart.caches.cache_file.rewrite import rewrite, write_stub
from headstart.caches.cache_file.writer import CacheWriter
from headstart.caches.entry import Entry, Form
from headstart.caches.files import sha256_of, storage_errors, sync_directory, take_lock
from headstart.caches.headers import Catalog, is_same
from headstart.caches.index.index import Index
from headstart.caches.index.usage import CacheUsage
from headstart.caches.removed import RemovedCaches
from headstart.caches.verified import Checked, Identities, Tokens, VerifiedState, identities
from headstart.errors import CacheConflict, CacheNotFound, StorageError
from headstart.names import CacheKey, Namespace
from headstart.protocol import StateRef

log = logging.getLogger(__name__)

SCRATCH = ".tmp-"


class Store:
    """Owns `directory`, by a lock, while open. Used from one thread; slow work runs in others. A namespace is
    a folder in it. `clock` gives the seconds since 1970 by which caches expire."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time) -> None:
        self.directory = directory.absolute()
        self.clock = clock
        self._in_use: set[CacheKey] = set()
        # Checks of states that failed since the start.
        self.n_corrupt = 0
        with storage_errors(f"the cache directory {self.directory}"):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = take_lock(self.directory)
            self._remove_scratch()
            self.index = Index(self.directory / "index.sqlite")
        self._catalog = Catalog(self.directory)
        self.path = self._catalog.path
        self.removed = RemovedCaches(self.path)
        self._checked = Checked()
        self.reconcile()
        self._catalog.take_over(self.index.earlier)
        self.index.earlier.clear()
        there = set(self._catalog.on_disk())
        self.index.keep_only(there)
        self._catalog.copies.keep_only(there)

    def use(self, key: CacheKey) -> None:
        """Protects the cache's files from deletion and replacement by others, until `release`."""
        self._in_use.add(key)

    def release(self, key: CacheKey) -> None:
        self._in_use.discard(key)

    def is_in_use(self, key: CacheKey) -> bool:
        return key in self._in_use

    def close(self) -> None:
        self.index.close()
        os.close(self._lock)

    def _remove_scratch(self) -> None:
        for left_over in self.directory.glob(f"*/{SCRATCH}*"):
            try:
                left_over.unlink()
            except OSError as error:
                log.warning("a file left by an interrupted write can't be deleted: %s", error)

    def reconcile(self) -> None:
        """Reads the whole directory again, to see changes made by others."""
        on_disk = {key for key in self._catalog.on_disk() if self._look(key)}
        for key in self._catalog.caches() - on_disk:
            self._forget(key)

    def _look(self, key: CacheKey) -> Entry | None:
        """The entry as read from the disk (see Catalog.look). An expired cache is removed: None."""
        known, entry = self._catalog.get(key), self._catalog.look(key)
        if entry is None and known:
            self._forget(key)
        if entry and self.index.is_expired(entry, self.clock()):
            self._expire(entry)
            return None
        return entry

    def is_from_copy(self, entry: Entry) -> bool:
        """Whether the cache's file can't be read, so that the entry comes from the copy of its header."""
        return self._catalog.is_from_copy(entry.key)

    def _forget(self, key: CacheKey) -> None:
        self._catalog.forget(key)
        self._checked.forget(key)
        self.index.delete(key)

    def remove_expired(self) -> None:
        """Removes the files of expired caches."""
        for entry in list(self.known()):
            if self.index.is_expired(entry, self.clock()):
                self._look(entry.key)

    def _expire(self, entry: Entry) -> None:
        if self.is_in_use(entry.key):
            return
        log.info("cache %s of %s has expired", entry.name, entry.namespace)
        try:
            # Nobody named an automatic cache.
            self._remove(entry.key, evicts=entry.origin == "automatic")
        except StorageError as error:
            # It stays hidden, and the next lookup tries again.
            log.warning("%s", error.message)

    def find(self, key: CacheKey, *, param: str = "use_cache") -> Entry:
        """Raises CacheNotFound, about the request's field `param`."""
        entry = self._look(key)
        if entry is None:
            model = key.namespace.model
            raise CacheNotFound(
                f"Model {model!r} has no cache {key.name!r}. Create it with POST /v1/cache/{model}.",
                param=param,
            )
        return entry

    def entries(self, namespace: Namespace | None = None) -> list[Entry]:
        keys = sorted(key for key in self._catalog.caches() if namespace in (None, key.namespace))
        return [entry for key in keys if (entry := self._look(key))]

    def known(self, namespace: Namespace | None = None) -> Iterator[Entry]:
        """The caches of the namespace, or all, as last read from the disk."""
        return (entry for entry in self._catalog.all() if namespace in (None, entry.namespace))

    async def weights_hash(self, path: Path) -> str:
        """The SHA-256 of a model file, computed once for each state of the file. Raises StorageError."""
        with storage_errors(str(path)):
            identity = format.identity_of(path.stat())
            known = self.index.weights_hash(str(path), identity)
            if known is None:
                known = await asyncio.to_thread(sha256_of, path)
                self.index.put_weights_hash(str(path), identity, known)
        return known

    def usage(self, entry: Entry) -> CacheUsage:
        return self.index.usage(entry.key)

    def used(self, entry: Entry, tokens: int = 0, restore_ms: float = 0.0) -> None:
        """Counts a hit that took `tokens` tokens from the cache, in `restore_ms`."""
        seconds = max(tokens * entry.ms_per_token - restore_ms, 0.0) / 1000
        if self._catalog.get(entry.key):
            self.index.used(entry.key, self.clock(), tokens, seconds)

    def touch(self, entry: Entry) -> None:
        """Records a use that is not a hit."""
        if self._catalog.get(entry.key):
            self.index.touch(entry.key, self.clock())

    async def verified(self, entry: Entry, form: Form) -> VerifiedState:
        """Checks the files' hashes once for each state of the files. Raises Corrupt, also if one is
        missing."""
        try:
            return await self._verified(entry, form)
        except Corrupt:
            self.n_corrupt += 1
            raise

    async def _verified(self, entry: Entry, form: Form) -> VerifiedState:
        path, key = self.path(entry.key), entry.key
        if self._checked.get(key, identities(path, entry)) is None:
            await self.check(entry)
        files = identities(path, entry)
        tokens = self._checked.get(key, files)
        if tokens is None or files[None] != entry.identity:
            raise Corrupt(f"{path} or its state is not the file it was")
        stored = entry.forms[form]
        place = sidecar.state_path(path, form) if stored.in_sidecar else path
        identity = files[form if stored.in_sidecar else None]
        assert identity is not None
        ref = StateRef(str(place), stored.state_offset, stored.state_bytes, stored.n_tokens, identity)
        return VerifiedState(tokens[form], ref)

    async def check(self, entry: Entry, *, from_disk: bool = False) -> dict[Form, Tokens]:
        """Checks the files' hashes in any case; returns each form's tokens. Raises Corrupt as `verified`."""
        path = self.path(entry.key)
        files = identities(path, entry)
        self._checked.forget(entry.key)
        try:
            tokens = await asyncio.to_thread(format.verify, path, entry.identity, from_disk=from_disk)
        except OSError as error:
            raise Corrupt(str(error)) from error
        self._checked.put(entry.key, files, tokens)
        return tokens

    def remembered(self, namespace: Namespace, form: Form) -> Iterator[Tokens]:
        """Token ids of the namespace's states that were checked since the start."""
        return self._checked.tokens(namespace, form)

    @contextmanager
    def scratch(self, namespace: Namespace) -> Iterator[Path]:
        """A new empty file in the namespace's folder, deleted at the end with its sidecar files unless moved
        into place. Raises StorageError, also for OSError from within."""
        path = self.directory / namespace / f"{SCRATCH}{uuid.uuid4().hex}"
        with storage_errors(f"the cache directory {self.directory}"):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            try:
                yield path
            finally:
                path.unlink(missing_ok=True)
                sidecar.keep_only(path)

    async def put(self, writer: CacheWriter, entry: Entry, repaired: Entry | None = None) -> Entry:
        """Publishes the written scratch file as the cache of its name, atomically, or only in place of
        `repaired`. Returns the stored entry. On CacheConflict or OSError the old one is untouched."""
        if repaired and not is_same(self._look(repaired.key), repaired):
            raise CacheConflict(f"The cache {entry.name!r} was replaced meanwhile, so it was not repaired.")
        self._before(entry)
        stored, files = await asyncio.to_thread(self._publish, writer, entry)
        self._checked.put(entry.key, files, writer.tokens)
        self._replace(stored)
        return stored

    def _before(self, entry: Entry) -> None:
        """The entry's file is about to be put in place."""
        self._catalog.tell_of_copy(entry)
        self.removed.note_replaced(self._catalog.get(entry.key), entry)

    def _replace(self, stored: Entry) -> None:
        key = stored.key
        previous = self._catalog.get(key)
        self._catalog.remember(stored)
        if previous and previous.content != stored.content:
            self._delete_derived(key)

    def _publish(self, writer: CacheWriter, entry: Entry) -> tuple[Entry, Identities]:
        final = self.path(entry.key)
        stored = writer.finish(entry)
        files = identities(writer.path, stored)
        writer.path.rename(final)
        sidecar.place(writer.path, final, stored.sidecar_forms)
        sync_directory(final.parent)
        return stored, files

    def delete(self, key: CacheKey, *, evicts: bool = False) -> None:
        """Raises CacheNotFound. Requests that have the file open can still read it. `evicts`: only to make
        room, so its text isn't noted as `removed`."""
        self.find(key, param="name")
        self._remove(key, evicts=evicts)

    async def amend(self, entry: Entry, changed: Entry, *, with_states: bool = True) -> Entry | None:
        """Replaces the cache atomically by `changed`, with its states or none; returns it as stored. None,
        with nothing changed, if it is no longer `entry` or is being built. Raises StorageError."""
        key = entry.key
        with self.scratch(entry.namespace) as scratch:
            write = partial(rewrite, self.path(key)) if with_states else write_stub
            stored = await asyncio.to_thread(write, scratch, changed)
            if self.is_in_use(key) or self._look(key) != entry:
                return None
            await self.publish(scratch, stored)
        return stored

    async def publish(self, scratch: Path, stored: Entry) -> None:
        """Publishes a written and synced scratch file; it is in place before the first await. Raises
        OSError."""
        self._before(stored)
        final = self.path(stored.key)
        scratch.rename(final)
        sidecar.keep_only(final, stored.sidecar_forms)
        self._replace(stored)
        await asyncio.to_thread(sync_directory, scratch.parent)

    def _remove(self, key: CacheKey, *, evicts: bool) -> None:
        path = self.path(key)
        if (known := self._catalog.get(key)) and not evicts:
            self.removed.note(known)
        with storage_errors(str(path)):
            sidecar.keep_only(path)
            path.unlink(missing_ok=True)
            sync_directory(path.parent)
        self._forget(key)
        self._delete_derived(key, evicts=evicts)

    def _delete_derived(self, key: CacheKey, *, evicts: bool = False) -> None:
        """Deletes derived caches with this part, which would never be found again, as far as possible."""
        # A key's derived caches may contain public ones.
        namespaces = (entry for entry in self.known() if key.namespace in (entry.namespace, entry.model))
        for entry in [entry for entry in namespaces if key.name in entry.parts]:
            try:
                self.delete(entry.key, evicts=evicts)
            except (CacheNotFound, StorageError) as error:
                log.warning("a derived cache was not deleted: %s", error)
