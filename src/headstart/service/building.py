"""Builds caches: has the engine compute states, and stores them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import time

from headstart.caches.entry import DEFAULT_TERMS, Content, Entry, Form, Origin, Terms
from headstart.caches.file import Corrupt, Part
from headstart.caches.store import Store
from headstart.caches.writing import Writer
from headstart.errors import HeadstartError
from headstart.messages import Finished, Progress, SaveTo, Stats, Submit
from headstart.prompt.prompts import soon
from headstart.service.model import ServedModel

OnProgress = Callable[[int, int], None]


async def opening_tokens(model: ServedModel, form: Form, content: Content) -> list[int]:
    """The tokens of a form's state, as they would be computed now."""
    prompts = model.prompts
    if form == "completion":
        return await soon(lambda most: prompts.text_opening(content.prompt, most))
    return await soon(lambda most: prompts.chat_opening(content.opening, most))


@dataclass(frozen=True)
class Build:
    """What is to be computed and stored; with `keep_states`, states that the previous version has already
    are not computed again."""

    model: ServedModel
    name: str
    content: Content
    forms: Sequence[Form]
    version: int
    terms: Terms = DEFAULT_TERMS
    origin: Origin = "client"
    previous: Entry | None = None
    keep_states: bool = True
    on_progress: OnProgress | None = None


class Builder:
    def __init__(self, store: Store) -> None:
        self.store = store

    async def build(self, build: Build) -> Entry:
        """Raises ContextLengthExceeded, StorageError or what the engine raises; then nothing has changed."""
        model = build.model
        wanted: dict[Form, list[int]] = {}
        for form in build.forms:
            if tokens := await opening_tokens(model, form, build.content):
                model.check_fits(len(tokens) + 1, param="prompt")
                wanted[form] = tokens
        progress = _Sum(sum(map(len, wanted.values())), build.on_progress)
        stats: list[Stats] = []
        with self.store.scratch(model.shelf) as path:
            writer = await asyncio.to_thread(Writer, path, _entry(build, stats), wanted)
            for form, tokens in wanted.items():
                if kept := await self._kept(build, form, tokens):
                    await asyncio.to_thread(writer.copy, form, kept)
                    progress.next(len(tokens))
                    continue
                stats.append(await self._compute(model, tokens, writer, progress))
                writer.wrote(form, stats[-1].saved_bytes, stats[-1].saved_blake3)
            return await self.store.put(writer, _entry(build, stats))

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

    async def _compute(self, model: ServedModel, tokens: list[int], writer: Writer, progress: _Sum) -> Stats:
        place = SaveTo(str(writer.path), writer.end)
        request = Submit(0, tokens, boundary=len(tokens), save_to=place, owner=model.owner)
        with model.engine.submit(request) as running:
            async for event in running:
                match event:
                    case Progress(computed=computed):
                        progress.tell(computed)
                    case Finished(stats=stats):
                        progress.next(len(tokens))
                        return stats
        raise HeadstartError("The engine ended the build without a result.")


def _entry(build: Build, stats: Sequence[Stats]) -> Entry:
    """The cache that the build makes, `stats` being those of the forms computed."""
    now = time()
    return Entry(
        model=build.model.name,
        name=build.name,
        prompt=build.content.prompt,
        messages=build.content.messages,
        tools=build.content.tools,
        owner=build.model.owner,
        terms=build.terms,
        origin=build.origin,
        version=build.version,
        created=build.previous.created if build.previous else now,
        updated=now,
        fingerprint=build.model.fingerprint,
        forms={},
        build_ms=sum(form.prefill_ms for form in stats),
        ttft_ms=_ttft_ms(stats, build.previous),
    )


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


def _ttft_ms(stats: Sequence[Stats], previous: Entry | None) -> float:
    """What the first token of the first form cost without the cache, now or when it was computed."""
    if stats:
        return stats[0].ttft_ms
    return previous.ttft_ms if previous else 0.0
