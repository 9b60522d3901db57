"""A model being served: its prompts, its engine, and what its states depend on."""

from __future__ import annotations

import asyncio
import copy
import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from time import time

import msgspec

from headstart.caches.entry import Entry, Fingerprint
from headstart.caches.store import Store
from headstart.config import Settings
from headstart.engine.client import EngineClient
from headstart.errors import BadRequest, ContextLengthExceeded, ModelLoading, StartupError
from headstart.messages import ModelInfo
from headstart.names import shelf_name
from headstart.prompt.prompts import Prompts
from headstart.prompt.template import ChatTemplate
from headstart.prompt.tokenizer import load_tokenizer
from headstart.regular import read_text
from headstart.service.fitting import doubted, kept_back, misfits, warnings
from headstart.service.plan import Plan, engine_settings, make_plan
from headstart.service.tunings import Tunings
from headstart.toyspec import ToySpec

Say = Callable[[str], None]


class ServedModel:
    """`owner`: the API key for whom it is seen, which says what caches it has; "" for everyone."""

    owner = ""

    def __init__(self, name: str, path: str, settings: Settings) -> None:
        self.name = name
        self.settings = settings
        self.path = model_path(path)
        self.created = int(time())
        self._template_file = settings.templates.get(name)
        self.engine = EngineClient(name, engine_settings(self.path, settings), settings.max_waiting)
        self._prompts: Prompts | None = None
        self._weights = ""

    async def load(
        self, store: Store, say: Say, measuring: asyncio.Lock, *, within_memory: bool = False
    ) -> None:
        """Returns when the model answers requests. Raises StartupError, or OutOfMemory where no more memory
        is to be taken than is available. Models are measured one at a time; what takes the user's time, or
        will, is said."""
        self._weights = await _weights_hash(self.path, store)
        tunings = Tunings(store.directory)
        plan = self.plan(store)
        self.engine.settings = msgspec.structs.replace(plan.settings, within_memory=within_memory)
        async with measuring if plan.measures else nullcontext():
            if plan.measures and not ToySpec.matches(self.path):
                say(f"Measuring what is fastest for {self.name} here (once per model and machine) ...")
            self.engine.start()
            try:
                prompts = await asyncio.to_thread(self._load_prompts)
                prompts.can_cut = (await self.engine.wait_ready()).can_cut
            except BaseException:
                # A worker without a tokenizer would count as loaded, or as being loaded for ever.
                if self.engine.state != "failed":
                    await self.engine.close()
                raise
            self._prompts = prompts
        tuning = self.engine.settings.tuning
        if plan.measures and tuning:
            tunings.put(plan.key, tuning)
            preferred = plan.kept_back(tuning)
            if preferred and tuning.counts:
                say(kept_back(self.name, tuning.arithmetic, preferred))
        suspect = tuning if plan.measures and tuning and not tuning.counts else plan.doubted
        if suspect:
            say(doubted(self.name, suspect))
        for warning in warnings(self.name, misfits(self.entries(store), self.fingerprint)):
            say(warning)

    def plan(self, store: Store) -> Plan:
        """With what it is to be run as things are now; its weights must have been hashed."""
        tunings = Tunings(store.directory)
        return make_plan(self.path, self._weights, self.settings, tunings, self.entries(store))

    @property
    def shelf(self) -> str:
        """Where its caches are."""
        return shelf_name(self.name, self.owner)

    def seen_by(self, owner: str) -> ServedModel:
        """The same model and engine with the caches of `owner`; to be made anew for each request."""
        if owner == self.owner:
            return self
        view = copy.copy(self)
        view.owner = owner
        return view

    def entries(self, store: Store) -> list[Entry]:
        """Its caches, whomever they belong to."""
        return [entry for entry in store.entries() if entry.model == self.name]

    def _load_prompts(self) -> Prompts:
        return load_prompts(self.path, self._template_file)

    @property
    def prompts(self) -> Prompts:
        """Raises ModelLoading until there is a tokenizer."""
        if self._prompts is None:
            raise ModelLoading(f"Model {self.name!r} is still loading.")
        return self._prompts

    @property
    def info(self) -> ModelInfo:
        """Raises ModelLoading until the engine has been ready once."""
        if self.engine.info is None or not self._weights:
            raise ModelLoading(f"Model {self.name!r} is still loading.")
        return self.engine.info

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self._weights, self.info.engine, self.info.settings, self.prompts.template_hash)

    def text(self, tokens: Sequence[int], *, param: str) -> str:
        """What an engine that takes text is to be given for these tokens; "" for others. Raises BadRequest
        for what its text would end at."""
        text = self.prompts.tokenizer.text(tokens) if self.info.takes_text else ""
        if "\0" in text:
            raise BadRequest("The NPU's runtime takes no text with a NUL character.", param=param)
        return text

    def check_fits(self, n_tokens: int, *, param: str) -> None:
        """Raises ContextLengthExceeded unless a prompt of `n_tokens` leaves room for an answer."""
        if n_tokens >= self.info.n_ctx:
            raise ContextLengthExceeded(n_tokens, self.info.n_ctx, param=param)


def _read(template: Path) -> str:
    try:
        return read_text(template, follow=True)
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"The chat template {template} can't be read: {error}") from error


def load_prompts(path: str, template_file: Path | None) -> Prompts:
    """Raises StartupError."""
    tokenizer = load_tokenizer(path)
    source = _read(template_file) if template_file else tokenizer.template
    return Prompts(tokenizer, ChatTemplate(source, tokenizer.bos_text, tokenizer.eos_text))


def model_path(path: str) -> str:
    return path if ToySpec.matches(path) else str(Path(path).expanduser().absolute())


def toy_weights(path: str) -> str:
    """What stands for the SHA-256 of a toy model's weights. Raises StartupError."""
    try:
        return hashlib.sha256(ToySpec.parse(path).weights.encode()).hexdigest()
    except ValueError as error:
        raise StartupError(str(error)) from error


async def _weights_hash(path: str, store: Store) -> str:
    if ToySpec.matches(path):
        return toy_weights(path)
    if not Path(path).is_file():
        raise StartupError(f"{path} can't be read: there is no such file")
    return await store.weights_hash(Path(path))
