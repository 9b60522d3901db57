"""The state of a cache with a common prefix, for a prompt without a usable state of its own."""

from __future__ import annotations

from dataclasses import dataclass

from headstart.caches.cache_file.format import Corrupt
from headstart.caches.entry import Content, Entry, Form
from headstart.caches.store import Store
from headstart.prompt.process.protocol import ChatPrefix, TextPrefix
from headstart.protocol import StateRef
from headstart.service.models.tenant_model import TenantModel
from headstart.tokens import common_prefix


@dataclass(frozen=True)
class Prefix:
    """A verified state and the number of tokens that it has in common with the prompt."""

    restore: StateRef | None = None
    shared: int | None = None


NOTHING = Prefix()


async def prefix_of(
    store: Store, model: TenantModel, entry: Entry | None, form: Form, tokens: list[int]
) -> Prefix:
    """The prefix that a prompt of these tokens shares with the cache. NOTHING also if the state is damaged,
    which is reported to requests that name the cache."""
    if entry is None or form not in entry.forms or not model.info.can_cut:
        return NOTHING
    if model.fingerprint.changed_since(entry.fingerprint):
        return NOTHING
    try:
        state = await store.verified(entry, form)
    except Corrupt:
        return NOTHING
    shared = common_prefix(state.tokens, tokens)
    return Prefix(state.ref, shared) if shared else NOTHING


def prefix_request(form: Form, content: Content) -> ChatPrefix | TextPrefix:
    if form == "completion":
        return TextPrefix(content.prompt)
    return ChatPrefix(content.prefix_messages, content.tools)


async def prefix_tokens(model: TenantModel, form: Form, content: Content) -> list[int]:
    """The tokens of a form's state, rendered with the current template."""
    return await model.prompts.one(prefix_request(form, content))
