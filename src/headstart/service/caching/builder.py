"""Builds caches: the engine computes the states, this module stores them."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic

from msgspec.structs import replace

from headstart.caches.cache_file.entry_checks import checked
from headstart.caches.cache_file.format import Corrupt, StatePart
from headstart.caches.cache_file.writer import CacheWriter, expected_size
from headstart.caches.entry import DEFAULT_RETENTION, Content, Entry, Form, Origin, Retention
from headstart.errors import BadRequest, HeadstartError
from headstart.protocol import Finished, Progress, SaveTo, Stats, Submit
from headstart.service.caching.prefix import Prefix, prefix_of, prefix_tokens
from headstart.service.caching.quota import Quota
from headstart.service.interface.observer import Built, Restored
from headstart.service.models.tenant_model import TenantModel

OnProgress = Callable[[int, int], None]


async def prefix_tokens_if_any(model: TenantModel, form: Form, content: Content) -> list[int]:
    """Like `prefix_tokens`, for requests that don't name the cache: returns no tokens if the template
    refuses the content, because that error doesn't concern the request."""
    try:
        return await prefix_tokens(model, form, content)
    except BadRequest:
        return []


@dataclass(frozen=True)
class Build:
    """A cache to compute and store. With `keep_states`, states that the previous version already has are not
    computed again. `base`: a cache with a common prefix, whose state is the starting point. `evicted`: forms
    stored without their states. `parts` are as in the entry."""

    model: TenantModel
    name: str
    content: Content
    forms: Sequence[Form]
    version: int
    retention: Retention = DEFAULT_RETENTION
    origin: Origin = "client"
    previous: Entry | None = None
    keep_states: bool = True
    on_progress: OnProgress | None = None
    base: Entry | None = None
    evicted: Sequence[Form] = ()
    parts: Sequence[str] = ()

    @property
    def repaired(self) -> Entry | None:
        """The stored cache whose states are only computed again. If another cache has replaced it meanwhile,
        the other one stays."""
        return self.previous if self.previous and self.previous.version and not self.keep_states else None


class Builder:
    def __init__(self, quota: Quota) -> None:
        self.store = quota.store
        self.quota = quota
        self.observer = quota.observer

    async def build(self, build: Build) -> Entry:
        """Raises BadRequest, ContextLengthExceeded, QuotaExceeded, CacheConflict, StorageError or an error of
        the engine; then nothing has changed except for evicted caches."""
        model, started = build.model, monotonic()
        build = dataclasses.replace(build, content=_checked(build.content))
        to_build: dict[Form, list[int]] = {}
        param = "prompt" if build.content.prompt else "messages"
        for form in build.forms:
            if tokens := await prefix_tokens(model, form, build.content):
                model.check_fits(len(tokens) + 1, param=param)
                to_build[form] = tokens
        progress = _Sum(sum(map(len, to_build.values())), build.on_progress)
        stats: dict[Form, Stats] = {}
        # The header has the same length whether or not these figures are known from before.
        entry = replace(_entry(build, stats, self.store.clock()), prefill_ms={}, ttft_ms=0.0)
        with (
            self.quota.reserving(model.key(build.name)) as room,
            self.store.scratch(model.namespace) as path,
        ):
            await room.reserve(_expected_size(model, entry, to_build))
            in_sidecars = model.info.state_files
            writer = await asyncio.to_thread(
                partial(CacheWriter, path, entry, to_build, in_sidecars=in_sidecars)
            )
            for form, tokens in to_build.items():
                if kept := await self._kept(build, form, tokens):
                    await asyncio.to_thread(writer.copy, form, kept)
                    progress.next(len(tokens))
                    continue
                prefix = await prefix_of(self.store, model, build.base, form, tokens)
                place, offset = writer.place(form)
                save_to = SaveTo(str(place), offset)
                text = model.text(tokens, param=param)
                stats[form] = await self._compute(model, tokens, prefix, save_to, text, progress)
                writer.wrote(form, stats[form].saved_bytes, stats[form].saved_blake3)
            # Corrects the reservation: the expected size was unknown or wrong.
            await room.reserve(writer.size)
            stored = await self.store.put(writer, _entry(build, stats, self.store.clock()), build.repaired)
        self.observer.built(Built(stored, stats, monotonic() - started))
        return stored

    async def _kept(self, build: Build, form: Form, tokens: list[int]) -> StatePart | None:
        """The stored state of the previous version, if it has the same tokens."""
        entry = build.previous
        if not (build.keep_states and entry and form in entry.forms):
            return None
        if build.model.fingerprint != entry.fingerprint:
            return None
        try:
            state = await self.store.verified(entry, form)
        except Corrupt:
            return None
        if state.tokens != tokens:
            return None
        return StatePart(tokens, Path(state.ref.path), state.ref.offset, state.ref.nbytes)

    async def _compute(
        self,
        model: TenantModel,
        tokens: list[int],
        prefix: Prefix,
        save_to: SaveTo,
        text: str,
        progress: _Sum,
    ) -> Stats:
        request = Submit(
            id=0,
            tokens=tokens,
            boundary=len(tokens),
            restore=prefix.restore,
            shared=prefix.shared,
            save_to=save_to,
            owner=model.owner,
            text=text,
        )
        with model.engine.submit(request) as running:
            async for event in running:
                match event:
                    case Progress(computed=computed):
                        progress.tell(computed)
                    case Finished(stats=stats):
                        if stats.restored_bytes:
                            self.observer.restored(Restored(model.name, stats))
                        progress.next(len(tokens))
                        return stats
        raise HeadstartError("The engine ended the build without a result.")


def _checked(content: Content) -> Content:
    """Raises BadRequest for content that no cache can hold."""
    try:
        return checked(content)
    except ValueError as error:
        field = re.match(r"prompt|messages|tools", str(error))
        raise BadRequest(f"{error}.", param=field and field[0]) from error


def _entry(build: Build, stats: Mapping[Form, Stats], now: float) -> Entry:
    """The entry of the cache that the build creates; `stats` are those of the computed forms."""
    return Entry(
        model=build.model.name,
        name=build.name,
        prompt=build.content.prompt,
        messages=build.content.messages,
        tools=build.content.tools,
        owner=build.model.owner,
        retention=build.retention,
        origin=build.origin,
        parts=list(build.parts),
        evicted=list(build.evicted),
        version=build.version,
        created=build.previous.created if build.previous else now,
        updated=now,
        fingerprint=build.model.fingerprint,
        forms={},
        build_ms=sum(form.prefill_ms for form in stats.values()),
        ttft_ms=_ttft_ms(stats, build.previous),
        prefill_ms=_prefill_ms(build, stats),
    )


def _expected_size(model: TenantModel, entry: Entry, tokens: Mapping[Form, Sequence[int]]) -> int:
    n_tokens = sum(map(len, tokens.values()))
    states = len(tokens) * model.info.state_bytes + n_tokens * model.info.state_token_bytes
    return expected_size(entry, n_tokens) + states


class _Sum:
    """Progress over several prefills."""

    def __init__(self, total: int, tell: OnProgress | None) -> None:
        self.total, self.done, self._tell = total, 0, tell

    def tell(self, computed: int) -> None:
        if self._tell:
            self._tell(self.done + computed, self.total)

    def next(self, n_tokens: int) -> None:
        self.done += n_tokens
        self.tell(0)


def _prefill_ms(build: Build, stats: Mapping[Form, Stats]) -> dict[Form, float]:
    """Milliseconds that each form takes to compute: measured in this build if most of its tokens were
    evaluated and not taken from a slot, otherwise as known from the previous version."""
    known = build.previous.prefill_ms if build.previous and build.previous.content == build.content else {}
    found = {form: known[form] for form in build.forms if form in known}
    for form, now in stats.items():
        if now.evaluated_tokens and (form not in found or 2 * now.evaluated_tokens >= now.prompt_tokens):
            found[form] = now.prefill_ms * now.prompt_tokens / now.evaluated_tokens
    return found


def _ttft_ms(stats: Mapping[Form, Stats], previous: Entry | None) -> float:
    """Time to first token of the first form without the cache, from this build or the one that computed the
    state."""
    if stats:
        return next(iter(stats.values())).ttft_ms
    return previous.ttft_ms if previous else 0.0
