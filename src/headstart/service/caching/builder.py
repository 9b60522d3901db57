"""Builds caches: has the engine compute states, and stores them."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from headstart.caches.cache_file.entry_checks import checked
from headstart.caches.cache_file.format import Corrupt, Part
from headstart.caches.cache_file.writer import Writer, expected_size
from headstart.caches.entry import DEFAULT_RETENTION, Content, Entry, Form, Origin, Retention
from headstart.caches.store import Store
from headstart.errors import BadRequest, HeadstartError
from headstart.protocol import Finished, Progress, SaveTo, Stats, Submit
from headstart.service.caching.prefix import Prefix, opening_tokens, prefix_of
from headstart.service.caching.quota import Quota
from headstart.service.models.model import ServedModel

OnProgress = Callable[[int, int], None]


async def opening_if_any(model: ServedModel, form: Form, content: Content) -> list[int]:
    """The same for whoever doesn't name a cache of this content: no tokens where the template refuses it,
    which has nothing to do with what they ask for."""
    try:
        return await opening_tokens(model, form, content)
    except BadRequest:
        return []


@dataclass(frozen=True)
class Build:
    """What is to be computed and stored; with `keep_states`, states that the previous version has already
    are not computed again. `head`: a cache that this one begins like, so that what they have in common is
    taken from it. `evicted`: forms that are stored without their states. `parts` are as in the entry."""

    model: ServedModel
    name: str
    content: Content
    forms: Sequence[Form]
    version: int
    terms: Retention = DEFAULT_RETENTION
    origin: Origin = "client"
    previous: Entry | None = None
    keep_states: bool = True
    on_progress: OnProgress | None = None
    head: Entry | None = None
    evicted: Sequence[Form] = ()
    parts: Sequence[str] = ()

    @property
    def repaired(self) -> Entry | None:
        """The stored cache whose states are only computed again: whatever took its place meanwhile stays."""
        return self.previous if self.previous and self.previous.version and not self.keep_states else None


class Builder:
    def __init__(self, store: Store, quota: Quota) -> None:
        self.store = store
        self.quota = quota

    async def build(self, build: Build) -> Entry:
        """Raises BadRequest, ContextLengthExceeded, QuotaExceeded, CacheConflict, StorageError or what the
        engine raises; then nothing has changed but for what was evicted."""
        model = build.model
        build = dataclasses.replace(build, content=_checked(build.content))
        wanted: dict[Form, list[int]] = {}
        param = "prompt" if build.content.prompt else "messages"
        for form in build.forms:
            if tokens := await opening_tokens(model, form, build.content):
                model.check_fits(len(tokens) + 1, param=param)
                wanted[form] = tokens
        progress = _Sum(sum(map(len, wanted.values())), build.on_progress)
        stats: dict[Form, Stats] = {}
        # Of one length whether or not the figures are known from before.
        entry = replace(_entry(build, stats, self.store.clock()), prefill_ms={}, ttft_ms=0.0)
        with (
            self.quota.reserving(model.namespace, build.name) as room,
            self.store.scratch(model.namespace) as path,
        ):
            await room.hold(_expected_size(model, entry, wanted))
            beside = model.info.state_files
            writer = await asyncio.to_thread(partial(Writer, path, entry, wanted, beside=beside))
            for form, tokens in wanted.items():
                if kept := await self._kept(build, form, tokens):
                    await asyncio.to_thread(writer.copy, form, kept)
                    progress.next(len(tokens))
                    continue
                head = await prefix_of(self.store, model, build.head, form, tokens)
                place, offset = writer.place(form)
                save_to = SaveTo(str(place), offset)
                text = model.text(tokens, param=param)
                stats[form] = await self._compute(model, tokens, head, save_to, text, progress)
                writer.wrote(form, stats[form].saved_bytes, stats[form].saved_blake3)
            # Where the size was not known before, or wrong.
            await room.hold(writer.size)
            return await self.store.put(writer, _entry(build, stats, self.store.clock()), build.repaired)

    async def _kept(self, build: Build, form: Form, tokens: list[int]) -> Part | None:
        """The state as it is stored already, where the same prompt is given again."""
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
        return Part(tokens, Path(state.ref.path), state.ref.offset, state.ref.nbytes)

    async def _compute(
        self, model: ServedModel, tokens: list[int], head: Prefix, save_to: SaveTo, text: str, progress: _Sum
    ) -> Stats:
        request = Submit(
            id=0,
            tokens=tokens,
            boundary=len(tokens),
            restore=head.restore,
            shared=head.shared,
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
                        progress.next(len(tokens))
                        return stats
        raise HeadstartError("The engine ended the build without a result.")


def _checked(content: Content) -> Content:
    """Raises BadRequest for what no cache can hold, whoever asks for it."""
    try:
        return checked(content)
    except ValueError as error:
        field = re.match(r"prompt|messages|tools", str(error))
        raise BadRequest(f"{error}.", param=field and field[0]) from error


def _entry(build: Build, stats: Mapping[Form, Stats], now: float) -> Entry:
    """The cache that the build makes, `stats` being those of the forms computed."""
    return Entry(
        model=build.model.name,
        name=build.name,
        prompt=build.content.prompt,
        messages=build.content.messages,
        tools=build.content.tools,
        owner=build.model.owner,
        terms=build.terms,
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


def _expected_size(model: ServedModel, entry: Entry, tokens: Mapping[Form, Sequence[int]]) -> int:
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
    """What computing each form takes: now, where most of it was computed and not taken from a slot, or else
    as it was known already."""
    known = build.previous.prefill_ms if build.previous and build.previous.content == build.content else {}
    found = {form: known[form] for form in build.forms if form in known}
    for form, now in stats.items():
        if now.evaluated_tokens and (form not in found or 2 * now.evaluated_tokens >= now.prompt_tokens):
            found[form] = now.prefill_ms * now.prompt_tokens / now.evaluated_tokens
    return found


def _ttft_ms(stats: Mapping[Form, Stats], previous: Entry | None) -> float:
    """What the first token of the first form cost without the cache, now or when it was computed."""
    if stats:
        return next(iter(stats.values())).ttft_ms
    return previous.ttft_ms if previous else 0.0
