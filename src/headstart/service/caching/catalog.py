"""The caches that an API key may use: its own and the public ones."""

from __future__ import annotations

from collections.abc import Iterator

from headstart.caches.entry import Entry, Form
from headstart.caches.store import Store
from headstart.errors import CacheNotFound
from headstart.names import CacheKey, Namespace, check_name
from headstart.service.models.tenant_model import TenantModel


class NamespaceCatalog:
    """Lookups that never wait."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def look_up(self, model: TenantModel, name: str, *, param: str) -> Entry:
        """The named cache of the owner or else the public one, in its current state. Raises InvalidName or
        CacheNotFound."""
        check_name(name, param=param)
        return self.find_visible(model, name) or self.store.find(model.key(name), param=param)

    def public_view(self, model: TenantModel, name: str, *, param: str) -> TenantModel | None:
        """A view of the model without an owner, if the named cache is public and the owner has none of this
        name. Raises InvalidName."""
        check_name(name, param=param)
        if not model.owner or self.own(model, name) or not self.at(CacheKey(Namespace(model.name), name)):
            return None
        return model.for_owner("")

    def find_visible(self, model: TenantModel, name: str) -> Entry | None:
        """The named cache of the owner or else the public one."""
        entries = (self.at(CacheKey(namespace, name)) for namespace in model.namespace.visible)
        return next((entry for entry in entries if entry), None)

    def known(self, model: TenantModel, form: Form) -> Iterator[Entry]:
        """The caches with a form, the owner's before the public ones, including evicted ones: prefill is cut
        where a cache ends even without its state, so that the answer is the same."""
        entries = (entry for namespace in model.namespace.visible for entry in self.store.known(namespace))
        return (entry for entry in entries if form in entry.forms or form in entry.evicted)

    def visible(self, owner: str, model: str | None = None) -> list[Entry]:
        """The owner's caches and the public ones, sorted by model and name; the owner's hides a public one of
        the same name. Stored responses are left out."""
        listed = [e for e in self.store.entries() if e.owner in ("", owner) and model in (None, e.model)]
        named = [e for e in listed if e.origin != "response"]
        by_name = {(e.model, e.name): e for e in sorted(named, key=lambda entry: entry.owner)}
        return [by_name[key] for key in sorted(by_name)]

    def known_prefix(self, model: TenantModel, text: str) -> str:
        """The longest cached completion prompt that is a prefix of `text`; "" for none."""
        known = self.known(model, "completion")
        matching = [entry for entry in known if entry.prompt and text.startswith(entry.prompt)]
        fitting = (entry.prompt for entry in matching if self.at(entry.key) == entry)
        return max(fitting, key=len, default="")

    def own(self, model: TenantModel, name: str) -> Entry | None:
        """The cache of this name in the model's namespace."""
        return self.at(model.key(name))

    def at(self, key: CacheKey) -> Entry | None:
        try:
            return self.store.find(key)
        except CacheNotFound:
            return None
