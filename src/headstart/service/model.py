"""A model being served: its prompts, its engine, and what its states depend on."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from time import time

from headstart.caches.entry import Fingerprint
from headstart.caches.store import Store
from headstart.config import Settings
from headstart.engine.client import EngineClient
from headstart.errors import ContextLengthExceeded, ModelLoading, StartupError
from headstart.messages import EngineSettings, ModelInfo
from headstart.prompt.prompts import Prompts
from headstart.prompt.template import ChatTemplate
from headstart.prompt.tokenizer import load_tokenizer
from headstart.toyspec import ToySpec


class ServedModel:
    def __init__(self, name: str, path: str, settings: Settings) -> None:
        self.name = name
        self.path = path if ToySpec.matches(path) else str(Path(path).expanduser().absolute())
        self.created = int(time())
        self._template_file = settings.templates.get(name)
        self.engine = EngineClient(name, _engine_settings(self.path, settings), settings.max_waiting)
        self._prompts: Prompts | None = None
        self._weights = ""

    async def load(self, store: Store) -> None:
        """Returns when the model answers requests. Raises StartupError."""
        self.engine.start()
        tokenizer = await asyncio.to_thread(load_tokenizer, self.path)
        source = _read(self._template_file) if self._template_file else tokenizer.template
        template = ChatTemplate(source, tokenizer.bos_text, tokenizer.eos_text)
        self._weights = await _weights_hash(self.path, store)
        info = await self.engine.wait_ready()
        self._prompts = Prompts(tokenizer, template, can_cut=info.can_cut)

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

    def check_fits(self, n_tokens: int, *, param: str) -> None:
        """Raises ContextLengthExceeded unless a prompt of `n_tokens` leaves room for an answer."""
        if n_tokens >= self.info.n_ctx:
            raise ContextLengthExceeded(n_tokens, self.info.n_ctx, param=param)


def _read(template: Path) -> str:
    try:
        return template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"The chat template {template} can't be read: {error}") from error


def _engine_settings(path: str, settings: Settings) -> EngineSettings:
    return EngineSettings(
        path=path,
        slots=settings.slots,
        ctx=settings.ctx,
        threads=settings.threads,
        prefill_chunk=settings.prefill_chunk,
        flash_attention=settings.flash_attention,
    )


async def _weights_hash(path: str, store: Store) -> str:
    if ToySpec.matches(path):
        return hashlib.sha256(ToySpec.parse(path).weights.encode()).hexdigest()
    return await store.weights_hash(Path(path))
