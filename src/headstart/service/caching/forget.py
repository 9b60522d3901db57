"""Removes the text of deleted, replaced and expired caches from the state stores."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from headstart.caches.entry import FORMS, Content, Entry, Form
from headstart.caches.removed import RemovedCache, tokens_of
from headstart.caches.store import Store
from headstart.errors import HeadstartError
from headstart.names import Namespace
from headstart.service.caching.prefix import prefix_tokens
from headstart.service.models.model import ServedModel
from headstart.service.models.state_stores import StateStores
from headstart.tokens import common_prefix


class StateRemoval:
    """Used from the event loop. A cache's text stays as far as another cache of its namespace begins with
    it."""

    def __init__(self, store: Store, states: StateStores, models: Mapping[str, ServedModel]) -> None:
        self.store = store
        self.states = states
        self.models = models
        self._working = asyncio.Lock()

    async def catch_up(self, model: str | None = None) -> None:
        """Returns when the text of all caches removed so far, of one model or of all, is gone from the
        stores. Raises EngineDied or StorageError, having tried all; then the next call tries again."""
        failure: HeadstartError | None = None
        async with self._working:
            for removed in self.store.removed.of(model):
                try:
                    await self._forget(removed)
                except HeadstartError as error:
                    failure = error
                else:
                    self.store.removed.settle(removed)
        if failure:
            raise failure

    async def _forget(self, removed: RemovedCache) -> None:
        entry = removed.entry
        prompts = [*removed.tokens.values(), *await self._rendered(entry)]
        if not prompts:
            # Which of the owner's blocks hold its text is unknown, so all go.
            return await self.states.forget(entry.model, entry.owner)
        kept = await asyncio.to_thread(self._kept_tokens, entry.namespace)
        kept += await self._neutral(entry)
        for tokens in {tuple(prompt): prompt for prompt in prompts if prompt}.values():
            n_kept = max((common_prefix(other, tokens) for other in kept), default=0)
            if n_kept < len(tokens):
                await self.states.forget(entry.model, entry.owner, tokens, [tokens[:n_kept]])

    def _kept_tokens(self, namespace: Namespace) -> list[list[int]]:
        """The tokens of the namespace's caches."""
        paths = [self.store.path(entry.key) for entry in list(self.store.known(namespace))]
        return [tokens for path in paths for tokens in tokens_of(path).values()]

    async def _rendered(self, entry: Entry) -> list[list[int]]:
        """The tokens of its text as requests would begin now; none unless the model is loaded."""
        return await self._tokens(entry, entry.content, entry.content.forms)

    async def _neutral(self, entry: Entry) -> list[list[int]]:
        """The tokens of another text: what every prompt begins with isn't this cache's."""
        said = str(entry.content.prefix_messages[0].get("content") or "")
        return await self._tokens(entry, Content("1" if said.startswith("0") else "0"), FORMS[:1])

    async def _tokens(self, entry: Entry, content: Content, forms: Iterable[Form]) -> list[list[int]]:
        model = self.models.get(entry.model)
        if model is None or model.engine.state != "ready":
            return []
        found = []
        for form in forms:
            try:
                found.append(await prefix_tokens(model.for_owner(entry.owner), form, content))
            except HeadstartError:
                # The template refuses it, or the model was unloaded meanwhile.
                continue
        return found
