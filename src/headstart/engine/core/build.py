"""Builds the engine loop from a loaded model and a worker's settings."""

from __future__ import annotations

from headstart.engine.core.chunking import Chunking
from headstart.engine.core.engine import CoreEngine
from headstart.engine.model import Model
from headstart.engine.worker_engine import Wake
from headstart.protocol import EngineSettings


def build_engine(model: Model, settings: EngineSettings, wake: Wake) -> CoreEngine:
    return CoreEngine(model, _chunking(settings), wake, share_from=settings.share_from or 0)


def _chunking(settings: EngineSettings) -> Chunking:
    tuning = settings.tuning
    if tuning is None:
        return Chunking(settings.prefill_chunk, settings.max_step_ms)
    costs = tuning.pass_ms, tuning.token_ms, tuning.attend_ms
    return Chunking(settings.prefill_chunk, settings.max_step_ms, *costs)
