"""Builds caches and decides whether a request may start from one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import time

from headstart.caches.entry import FORMS, KEEPS_STATE, Entry, Form, MissReason
from headstart.caches.file import Corrupt, Part
from headstart.caches.store import Store
from headstart.errors import BadRequest, CacheConflict, CacheNotFound, HeadstartError
from headstart.messages import Finished, Progress, StateRef, Stats, Submit
from headstart.names import check_name
from headstart.service.model import ServedModel
from headstart.tokens import common_prefix

log = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Opening:
    """What a named cache does for a request: `boundary` tokens come from `restore`, or why they don't."""

    boundary: int
    restore: StateRef | None = None
    miss: MissReason | None = None


def opening_tokens(model: ServedModel, form: Form, prompt: str) -> list[int]:
    """The tokens of a form's state, as they would be computed now."""
    if form == "completion":
        return model.prompts.text_opening(prompt)
    return model.prompts.chat_opening([{"role": "system", "content": prompt}])


@dataclass(frozen=True)
class Build:
    """What is to be computed and stored; with `keep_states`, states that the previous version has already
    are not computed again."""

    model: ServedModel
    name: str
    prompt: str
    forms: Sequence[Form]
    version: int
    previous: Entry | None = None
    keep_states: bool = True
    on_progress: OnProgress | None = None


class Caching:
    """Used from the event loop. At most one build of a name runs at a time."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._builds: dict[tuple[str, str], asyncio.Task[Entry]] = {}

    async def close(self) -> None:
        for build in list(self._builds.values()):
            build.cancel()
        await asyncio.gather(*self._builds.values(), return_exceptions=True)

    async def find(self, model: ServedModel, name: str) -> Entry:
        """The named cache, waiting for it where its first build is running. Raises CacheNotFound."""
        check_name(name, param="use_cache")
        try:
            return self.store.find(model.name, name)
        except CacheNotFound:
            if not (build := self._builds.get((model.name, name))):
                raise
        await asyncio.wait([build])
        return self.store.find(model.name, name)

    async def open(self, model: ServedModel, entry: Entry, form: Form, tokens: list[int]) -> Opening | None:
        """How a request whose prompt is `tokens` starts from the cache; None when the cache was replaced or
        built again meanwhile, so that the request has to look at it anew."""
        key = (entry.model, entry.name)
        # A build that ends while the old state is looked at is one that had begun before.
        build = self._builds.get(key)
        opening = await self._open(model, entry, form, tokens)
        if opening.miss is None or opening.miss in KEEPS_STATE:
            return opening
        if build := build or self._builds.get(key):
            await asyncio.wait([build])
            return None
        return opening if self._current(model, entry.name) == entry else None

    async def _open(self, model: ServedModel, entry: Entry, form: Form, tokens: list[int]) -> Opening:
        wanted = await asyncio.to_thread(opening_tokens, model, form, entry.prompt)
        boundary = min(common_prefix(wanted, tokens), len(tokens) - 1)
        if reason := model.fingerprint.changed_since(entry.fingerprint):
            return Opening(boundary, miss=reason)
        if form not in entry.forms:
            return Opening(boundary, miss="form_not_built" if wanted else "too_short")
        if boundary <= 0 or (boundary < len(wanted) and not model.info.can_cut):
            return Opening(max(boundary, 0), miss="prompt_differs")
        try:
            state = await self.store.verified(entry, form)
        except Corrupt as error:
            log.warning("cache %s of %s is damaged: %s", entry.name, entry.model, error)
            return Opening(boundary, miss="corrupt")
        if state.tokens != wanted:
            return Opening(boundary, miss="template_changed")
        return Opening(boundary, restore=state.ref)

    async def create(
        self,
        model: ServedModel,
        name: str,
        prompt: str,
        *,
        forms: Sequence[Form] = FORMS,
        overwrite: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Entry:
        """Computes and stores the states of `prompt`; version 1 of the entry means that the name was new.

        Raises BadRequest, CacheConflict, StorageError or what the engine raises; then nothing has changed.
        When the caller is cancelled, so is the build."""
        check_name(name, param="cache_name")
        if not prompt:
            raise BadRequest("The prompt is empty: there is nothing to keep.", param="prompt")
        self._check_not_building(model, name)
        previous = self._current(model, name)
        if previous and not overwrite:
            raise CacheConflict(f"There is a cache {name!r} already.", param="cache_name")
        version = previous.version + 1 if previous else 1
        build = self._start(Build(model, name, prompt, forms, version, previous, on_progress=on_progress))
        try:
            return await asyncio.shield(build)
        finally:
            build.cancel()

    def delete(self, model: ServedModel, name: str) -> None:
        """Raises CacheNotFound, or CacheConflict while the name is being built."""
        check_name(name, param="name")
        self._check_not_building(model, name)
        self.store.delete(model.name, name)

    def rebuild(self, model: ServedModel, entry: Entry) -> None:
        """Starts computing the states of `entry` again, unless that is being done or it was replaced;
        requests for it wait."""
        if (entry.model, entry.name) not in self._builds and self._current(model, entry.name) == entry:
            forms = tuple(entry.forms) or FORMS
            self._start(
                Build(model, entry.name, entry.prompt, forms, entry.version, entry, keep_states=False)
            )

    def known_opening(self, model: ServedModel, text: str) -> str:
        """The longest cached completion prompt that `text` begins with; "" for none."""
        prompts = (e.prompt for e in self.store.list(model.name) if "completion" in e.forms)
        return max((p for p in prompts if text.startswith(p)), key=len, default="")

    def _check_not_building(self, model: ServedModel, name: str) -> None:
        if (model.name, name) in self._builds:
            raise CacheConflict(f"The cache {name!r} is being built.", param="cache_name")

    def _current(self, model: ServedModel, name: str) -> Entry | None:
        try:
            return self.store.find(model.name, name)
        except CacheNotFound:
            return None

    def _start(self, build: Build) -> asyncio.Task[Entry]:
        key = (build.model.name, build.name)
        task = asyncio.create_task(self._build(build))
        self._builds[key] = task
        task.add_done_callback(lambda done: self._ended(key, done))
        return task

    def _ended(self, key: tuple[str, str], task: asyncio.Task[Entry]) -> None:
        del self._builds[key]
        if not task.cancelled() and (error := task.exception()):
            log.warning("building cache %s of %s failed: %s", key[1], key[0], error)

    async def _build(self, build: Build) -> Entry:
        model = build.model
        wanted: dict[Form, list[int]] = {}
        for form in build.forms:
            if tokens := await asyncio.to_thread(opening_tokens, model, form, build.prompt):
                model.check_fits(len(tokens) + 1, param="prompt")
                wanted[form] = tokens
        progress = _Sum(sum(map(len, wanted.values())), build.on_progress)
        with ExitStack() as scratch:
            parts: dict[Form, Part] = {}
            stats: list[Stats] = []
            for form, tokens in wanted.items():
                if kept := await self._kept(build, form, tokens):
                    parts[form] = kept
                    progress.next(len(tokens))
                    continue
                path = scratch.enter_context(self.store.scratch(model.name))
                stats.append(await self._compute(model, tokens, path, progress))
                parts[form] = Part(tokens, path, 0, stats[-1].saved_bytes)
            now = time()
            entry = Entry(
                model=model.name,
                name=build.name,
                prompt=build.prompt,
                version=build.version,
                created=build.previous.created if build.previous else now,
                updated=now,
                fingerprint=model.fingerprint,
                forms={},
                build_ms=sum(form.prefill_ms for form in stats),
                ttft_ms=_ttft_ms(stats, build.previous),
            )
            return await self.store.put(entry, parts)

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

    async def _compute(self, model: ServedModel, tokens: list[int], path: Path, progress: _Sum) -> Stats:
        request = Submit(0, tokens, boundary=len(tokens), save_path=str(path))
        with model.engine.submit(request) as running:
            async for event in running:
                match event:
                    case Progress(computed=computed):
                        progress.tell(computed)
                    case Finished(stats=stats):
                        progress.next(len(tokens))
                        return stats
        raise HeadstartError("The engine ended the build without a result.")


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
