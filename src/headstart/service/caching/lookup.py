"""Decides whether a request can start from a cache's state; if not, gives the miss reason."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from headstart.caches.cache_file.format import Corrupt
from headstart.caches.entry import Entry, Form, MissReason
from headstart.caches.store import Store
from headstart.errors import BadRequest
from headstart.protocol import StateRef
from headstart.service.caching.prefix import prefix_of, prefix_tokens
from headstart.service.models.tenant_model import TenantModel
from headstart.tokens import common_prefix

log = logging.getLogger(__name__)

# Stands for any token after the cache's prefix.
NO_TOKEN = -1


@dataclass(frozen=True)
class Start:
    """How a request starts. `restore`: the state to load; it covers `boundary` tokens. On a miss, `miss` is
    the reason, and `restore` may be a state of which the request has `shared` tokens in common. `needed`: the
    number of tokens that a hit reuses at least, half of the cache's."""

    boundary: int
    restore: StateRef | None = None
    miss: MissReason | None = None
    shared: int | None = None
    needed: int = 0


async def decide_start(
    store: Store,
    model: TenantModel,
    entry: Entry,
    form: Form,
    tokens: list[int],
    base: Entry | None = None,
    expected: list[int] | None = None,
) -> Start:
    """How a request with the prompt `tokens` starts from the cache at present. If the cache is evicted, or
    derived and not yet built, the state of `base`, a cache with a common prefix, is used. `expected`: the
    cache's `prefix_tokens`, if known. Raises ModelLoading."""
    try:
        expected = await prefix_tokens(model, form, entry.content) if expected is None else expected
    except BadRequest as error:
        # The content was accepted by another template, or has never been rendered.
        log.warning("cache %s of %s can't be used: %s", entry.name, entry.namespace, error.message)
        return Start(0, miss="template_changed")
    boundary = min(common_prefix(expected, tokens), len(tokens) - 1)
    reason: MissReason | None
    if reason := model.fingerprint.changed_since(entry.fingerprint):
        return Start(boundary, miss=reason)
    if form in entry.evicted and boundary > 0:
        start = await prefix_of(store, model, base, form, tokens)
        reason = "evicted" if entry.version else "first_use"
        return Start(boundary, start.restore, reason, start.shared)
    if form not in entry.forms:
        return Start(boundary, miss="form_not_built" if expected else "too_short")
    if boundary <= 0 or (boundary < len(expected) and not model.info.can_cut):
        return Start(max(boundary, 0), miss="prompt_differs")
    stored = entry.forms[form]
    if stored.n_tokens != len(expected):
        return Start(boundary, miss="template_changed")
    if 0 < _most_bytes(model, stored.n_tokens) < stored.state_bytes:
        log.warning("cache %s of %s is damaged: its state is too large", entry.name, entry.model)
        return Start(boundary, miss="corrupt")
    try:
        state = await store.verified(entry, form)
    except Corrupt as error:
        log.warning("cache %s of %s is damaged: %s", entry.name, entry.model, error)
        return Start(boundary, miss="corrupt")
    if state.tokens != expected:
        return Start(boundary, miss="template_changed")
    needed = (len(expected) + 1) // 2
    if boundary < needed:
        return Start(boundary, state.ref, "prompt_differs", shared=boundary)
    return Start(boundary, restore=state.ref, needed=needed)


def _most_bytes(model: TenantModel, n_tokens: int) -> int:
    """Upper bound of a state's size in bytes; 0 if unknown."""
    return model.info.state_bytes + n_tokens * model.info.state_token_bytes


async def miss_reason(store: Store, model: TenantModel, entry: Entry) -> MissReason | None:
    """The miss reason of a request that begins with the cache; None if it would hit. Raises ModelLoading."""
    for form in tuple(entry.forms) or entry.content.forms:
        try:
            expected = await prefix_tokens(model, form, entry.content)
        except BadRequest:
            return "template_changed"
        start = await decide_start(store, model, entry, form, [*expected, NO_TOKEN])
        if start.miss:
            return start.miss
    return None
