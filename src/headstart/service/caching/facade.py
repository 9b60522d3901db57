"""The caches of a server, as its API manages them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from msgspec.structs import replace

from headstart.caches.entry import Content, Entry, Form, MissReason
from headstart.caches.index.usage import CacheUsage
from headstart.caches.store import Store
from headstart.protocol import StoreReport
from headstart.service.caching.builder import OnProgress
from headstart.service.caching.caching import Caching
from headstart.service.caching.forget import StateRemoval
from headstart.service.caching.lookup import miss_reason
from headstart.service.caching.quota import Quota
from headstart.service.caching.transfer import Exported, Transfer
from headstart.service.caching.verify import Verdict, Verifier, VerifyScope
from headstart.service.models.reuse import ReuseCounter
from headstart.service.models.state_stores import StoreState
from headstart.service.models.tenant_model import TenantModel


@dataclass(frozen=True)
class Totals:
    """Bytes that the files of an owner's caches, or of all, take and may take (0: no limit), and the number
    of evictions since the start."""

    used: int
    limit: int
    evictions: int


class Caches:
    def __init__(
        self,
        store: Store,
        caching: Caching,
        quota: Quota,
        verifier: Verifier,
        removal: StateRemoval,
        reuse: ReuseCounter,
    ) -> None:
        self._store = store
        self._caching = caching
        self._quota = quota
        self._verifier = verifier
        self._states = removal.states
        self._removal = removal
        self._reuse = reuse
        self._transfer = Transfer(store, caching, quota)

    def visible(self, owner: str, model: str | None = None) -> list[Entry]:
        """The owner's caches and the public ones; see NamespaceCatalog.visible."""
        return self._caching.namespaces.visible(owner, model)

    def building(self, owner: str | None, model: str | None = None) -> list[tuple[str, str]]:
        """Model and name of each cache that is being built or is to be built; see Caching.building."""
        return self._caching.building(owner, model)

    def totals(self, owner: str, *, all_evictions: bool) -> Totals:
        """Figures of an owner's caches; of all for the owner "". `all_evictions`: count others' too."""
        quota = self._quota
        evictions = quota.evictions.total() if all_evictions else quota.evictions[owner]
        return Totals(quota.used(owner or None), quota.limit_of(owner), evictions)

    def sizes(self) -> dict[str, int]:
        """Bytes of the cache files of each model, as last read."""
        sizes: dict[str, int] = {}
        for entry in self._store.known():
            sizes[entry.model] = sizes.get(entry.model, 0) + entry.size_bytes
        return sizes

    @property
    def n_corrupt(self) -> int:
        """The number of states whose check failed since the start."""
        return self._store.n_corrupt

    async def states(self, model: str | None) -> StoreState:
        """The content of the state stores of a model, or of all. Raises StorageError."""
        return await self._states.state(model, self._reuse.of(model))

    def reports(self) -> dict[str, StoreReport]:
        """The last report of each model's store."""
        return self._states.reports()

    async def clear_states(self, owner: str | None, model: str | None) -> None:
        """Raises as StateStores.clear."""
        await self._states.clear(owner, model)

    def look_up(self, model: TenantModel, name: str, *, param: str) -> Entry:
        """The owner's cache of this name, or else the public one. Raises InvalidName or CacheNotFound."""
        return self._caching.namespaces.look_up(model, name, param=param)

    def public_view(self, model: TenantModel, name: str) -> TenantModel | None:
        """The model as seen by the public, if the named cache is public and the owner has none of this name.
        Raises InvalidName."""
        return self._caching.namespaces.public_view(model, name, param="name")

    def is_declared(self, model: TenantModel, name: str) -> bool:
        return self._caching.is_declared(model, name)

    async def miss_reason(self, model: TenantModel, entry: Entry) -> MissReason | None:
        """Why a request that names the cache would not start from its state; None if it would. Raises
        ModelLoading."""
        return await miss_reason(self._store, model, entry)

    def usage(self, entry: Entry) -> CacheUsage:
        return self._store.usage(entry)

    def expires_at(self, entry: Entry) -> float | None:
        """When the cache expires, in seconds since 1970; None: never."""
        return self._store.index.expires_at(entry)

    def is_from_copy(self, entry: Entry) -> bool:
        """Whether the cache's file can't be read, so that its text comes from an unverified copy."""
        return self._store.is_from_copy(entry)

    async def create(
        self,
        model: TenantModel,
        name: str,
        content: Content,
        *,
        forms: Sequence[Form] | None = None,
        given: Mapping[str, Any] = MappingProxyType({}),
        overwrite: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Entry:
        """Creates or replaces a cache, which keeps the fields of its retention that aren't `given`. Raises as
        Caching.create, or as StateRemoval.catch_up when it was replaced."""
        entry = await self._caching.create(
            model,
            name,
            content,
            forms=forms,
            retention=replace(self._caching.retention(model, name), **given),
            overwrite=overwrite,
            on_progress=on_progress,
        )
        await self._removal.catch_up(model.name)
        return entry

    async def edit(self, model: TenantModel, name: str, given: Mapping[str, Any]) -> Entry:
        """Changes the `given` fields of the retention. Raises as Caching.edit."""
        return await self._caching.edit(model, name, given)

    async def delete(self, model: TenantModel, name: str) -> None:
        """Its text is gone from the state stores, too. Raises InvalidName, CacheNotFound or CacheConflict;
        when it was deleted, as StateRemoval.catch_up."""
        self._caching.delete(model, name)
        await self._removal.catch_up(model.name)

    async def export(self, model: TenantModel, name: str) -> Exported:
        """Opens the cache's file; the caller closes it. Raises as Transfer.export."""
        return await self._transfer.export(model, name)

    async def import_file(
        self,
        model: TenantModel,
        name: str,
        chunks: AsyncIterator[bytes],
        *,
        size: int | None,
        overwrite: bool,
        rebuild: bool,
    ) -> Entry:
        """Imports a cache file. Raises as Transfer.import_file, or as StateRemoval.catch_up when it has
        replaced another."""
        entry = await self._transfer.import_file(
            model, name, chunks, size=size, overwrite=overwrite, rebuild=rebuild
        )
        await self._removal.catch_up(model.name)
        return entry

    def verify(self, scope: VerifyScope) -> AsyncGenerator[Verdict, None]:
        """Checks caches, and repairs them on request; see Verifier.verify."""
        return self._verifier.verify(scope)
