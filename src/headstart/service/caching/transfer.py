"""Export and import of cache files."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from msgspec.structs import replace

from headstart.caches.cache_file import format
from headstart.caches.cache_file.format import Corrupt
from headstart.caches.cache_file.header import HASH, read_header
from headstart.caches.cache_file.rewrite import rewrite
from headstart.caches.cache_file.validate import read_intact
from headstart.caches.entry import Entry
from headstart.caches.store import Store
from headstart.errors import (
    BadRequest,
    CacheConflict,
    CacheMismatch,
    CacheNotFound,
    DamagedFile,
    StorageError,
    StorageFull,
)
from headstart.names import Namespace, check_name
from headstart.service.caching.caching import Caching
from headstart.service.caching.derived import check_own_name
from headstart.service.caching.prefix import prefix_tokens
from headstart.service.caching.quota import Quota
from headstart.service.models.tenant_model import TenantModel

WRITE_BYTES = 1 << 20


@dataclass(frozen=True)
class Exported:
    """An open cache file: its content doesn't change, whatever happens to the cache. `digest`: the hash of
    its header, and so of the whole file, since the header contains the hashes of the rest. The receiver
    closes it."""

    entry: Entry
    file: BinaryIO
    size: int
    digest: str


class Transfer:
    def __init__(self, store: Store, caching: Caching, quota: Quota) -> None:
        self.store = store
        self.caching = caching
        self.quota = quota

    async def export(self, model: TenantModel, name: str) -> Exported:
        """Raises CacheNotFound, BadRequest if the states are in sidecar files, or StorageError if the header
        is damaged."""
        entry = self.store.find(model.key(check_name(name, param="name")), param="name")
        if entry.sidecar_forms:
            raise BadRequest(
                f"The states of cache {name!r} are files of the NPU's runtime and can't be exported; "
                "create the cache on the other server from its prompt.",
                param="name",
            )
        try:
            return await asyncio.to_thread(_open, self.store.path(model.key(name)), entry)
        except FileNotFoundError:
            raise CacheNotFound(f"The cache {name!r} was deleted.", param="name") from None
        except (Corrupt, OSError) as error:
            raise StorageError(f"The file of cache {name!r} can't be read: {error}") from error

    async def import_file(
        self,
        model: TenantModel,
        name: str,
        chunks: AsyncIterator[bytes],
        *,
        size: int | None = None,
        overwrite: bool = True,
        rebuild: bool = False,
    ) -> Entry:
        """Imports a file received in `chunks`, of `size` bytes if known, as the cache of this name.
        `rebuild`: only the content is taken, and the states are computed here.

        Raises DamagedFile, CacheMismatch, CacheConflict, QuotaExceeded or StorageError, or an error of
        `chunks` or of a build; then nothing has changed except for evicted caches."""
        check_own_name(name, param="name")
        self.caching.check_not_declared(model, name, param="name")
        self._check_free(model, name, overwrite)
        with self.store.scratch(model.namespace) as scratch:
            self._check_room(model.namespace, size or 0)
            await self._receive(model.namespace, chunks, scratch)
            try:
                entry = await asyncio.to_thread(read_intact, scratch)
            except Corrupt as error:
                reason = str(error).removeprefix(f"{scratch}: ")
                raise DamagedFile(f"The file is damaged: {reason}.") from error
            if not rebuild:
                _check_fits(model, entry)
                await _check_renders(model, entry)
                self._check_free(model, name, overwrite)
                work = self.caching.builds.run(model.key(name), self._place(model, name, scratch, entry))
                try:
                    return await asyncio.shield(work)
                finally:
                    work.cancel()
        forms = (*entry.forms, *entry.evicted) or None
        return await self.caching.create(
            model, name, entry.content, forms=forms, retention=entry.retention, overwrite=overwrite
        )

    def _check_free(self, model: TenantModel, name: str, overwrite: bool) -> None:
        self.caching.builds.check_none(model.key(name))
        if not overwrite and self.caching.namespaces.own(model, name):
            raise CacheConflict(f"There is a cache {name!r} already.", param="name")

    def _check_room(self, namespace: Namespace, size: int) -> None:
        self.quota.check_possible(namespace, size)
        if size > shutil.disk_usage(self.store.directory).free:
            raise StorageFull(f"The disk has no room for {size / 1e6:.2f} MB.")

    async def _receive(self, namespace: Namespace, chunks: AsyncIterator[bytes], scratch: Path) -> None:
        waiting, size = bytearray(), 0
        with scratch.open("wb") as output:
            async for chunk in chunks:
                size += len(chunk)
                self.quota.check_possible(namespace, size)
                waiting += chunk
                if len(waiting) >= WRITE_BYTES:
                    await asyncio.to_thread(output.write, bytes(waiting))
                    waiting.clear()
            await asyncio.to_thread(output.write, bytes(waiting))

    async def _place(self, model: TenantModel, name: str, scratch: Path, entry: Entry) -> Entry:
        previous = self.caching.namespaces.own(model, name)
        now = self.store.clock()
        placed = replace(
            entry,
            model=model.name,
            name=name,
            owner=model.owner,
            version=previous.version + 1 if previous else 1,
            created=previous.created if previous else now,
            updated=now,
            origin="client",
            parts=[],
        )
        with (
            self.quota.reserving(model.key(name)) as room,
            self.store.scratch(model.namespace) as target,
        ):
            await room.reserve(entry.size_bytes)
            stored = await asyncio.to_thread(rewrite, scratch, target, placed)
            await room.reserve(stored.size_bytes)
            await self.store.publish(target, stored)
        return stored


def _open(path: Path, entry: Entry) -> Exported:
    file = format.open_file(path)
    try:
        header = read_header(file)
        size = os.fstat(file.fileno()).st_size
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return Exported(entry, file, size, header.metadata[HASH])


async def _check_renders(model: TenantModel, entry: Entry) -> None:
    """Raises BadRequest, as creating the cache would, if the model can't render or hold its content."""
    for form in entry.content.forms:
        tokens = await prefix_tokens(model, form, entry.content)
        model.check_fits(len(tokens) + 1, param="prompt" if entry.prompt else "messages")


def _check_fits(model: TenantModel, entry: Entry) -> None:
    """Raises CacheMismatch."""
    if reason := model.fingerprint.changed_since(entry.fingerprint):
        raise CacheMismatch(
            f"The states were computed with another fingerprint than that of {model.name!r}: "
            f"{model.fingerprint.differences(entry.fingerprint)}. Send the file with ?rebuild=true to have "
            "its text computed here.",
            reason=reason,
        )
