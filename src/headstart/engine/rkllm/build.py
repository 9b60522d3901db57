"""Builds the NPU engine from a worker's settings."""

from __future__ import annotations

from functools import partial

from headstart.engine.rkllm.engine import RkllmEngine
from headstart.engine.rkllm.options import LIBRARY, RuntimeOptions
from headstart.engine.rkllm.runtime import Runtime
from headstart.engine.worker_engine import Wake
from headstart.protocol import EngineSettings

DEFAULT_CTX = 4096


def build_engine(settings: EngineSettings, wake: Wake) -> RkllmEngine:
    """Loads the model. Raises ModelError."""
    return RkllmEngine(partial(Runtime, settings.path, options_of(settings)), wake)


def options_of(settings: EngineSettings) -> RuntimeOptions:
    given = settings.rkllm
    n_ctx = settings.ctx or DEFAULT_CTX
    return RuntimeOptions(
        library=given.library or LIBRARY,
        abi=given.abi,
        n_ctx=n_ctx,
        max_new_tokens=n_ctx,
        sampling=given.sampling,
        cpus=given.cpus,
        cpu_mask=given.cpu_mask,
        embed_flash=given.embed_flash,
        log_level=given.log_level,
    )
