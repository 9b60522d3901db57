"""Builds the engine loop from a loaded model and a worker's settings."""

from __future__ import annotations

from pathlib import Path

import msgspec
from blake3 import blake3

from headstart.engine.core.chunking import Chunking
from headstart.engine.core.engine import CoreEngine
from headstart.engine.model import Model
from headstart.engine.states.disk import DiskTier
from headstart.engine.states.store import StateStore
from headstart.engine.worker_engine import Wake
from headstart.machine import cpu_model
from headstart.protocol import EngineSettings, ModelInfo, StateSettings

# Another number makes all stored states unusable.
FORMAT = 1


def build_engine(model: Model, settings: EngineSettings, wake: Wake) -> CoreEngine:
    chunking = _chunking(settings)
    store = _store(model, settings.states, chunking, wake)
    return CoreEngine(model, chunking, wake, share_from=settings.share_from or 0, store=store)


def _store(model: Model, states: StateSettings, chunking: Chunking, wake: Wake) -> StateStore | None:
    """None if the model's states can't be cut, or nothing is to be kept."""
    if model.slices is None or not (states.memory_bytes or states.disk_bytes):
        return None
    disk = None
    if states.directory:
        path, root = Path(states.directory), _root(model.info, states.weights)
        disk = DiskTier(path, root, states.disk_bytes, wake)
    return StateStore(
        model.slices,
        states.memory_bytes,
        disk,
        lambda start, end: chunking.cost(start, end - start),
        days=states.days,
    )


def _root(info: ModelInfo, weights: str) -> str:
    """A hash of everything that a state's bytes depend on besides its tokens."""
    parts = (FORMAT, weights, info.engine, sorted(info.settings.items()), cpu_model())
    return blake3(msgspec.json.encode(parts)).hexdigest()


def _chunking(settings: EngineSettings) -> Chunking:
    tuning = settings.tuning
    if tuning is None:
        return Chunking(settings.prefill_chunk, settings.max_step_ms)
    costs = tuning.pass_ms, tuning.token_ms, tuning.attend_ms
    return Chunking(settings.prefill_chunk, settings.max_step_ms, *costs)
