"""Resolves a worker's open settings: from its tuning, by measuring, or by defaults."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping

import msgspec

from headstart.engine.kinds import engine_kind
from headstart.engine.model import ModelError
from headstart.engine.tuning.constant import DEFAULT_CHUNK, DEFAULT_SHARE_FROM
from headstart.machine import available_cpus
from headstart.numerics import DEFAULT, Tuning
from headstart.protocol import EngineSettings

log = logging.getLogger(__name__)


def resolved(settings: EngineSettings, tuning: Tuning | None) -> EngineSettings:
    """The settings with nothing left open. A tuning that doesn't count is not used."""
    tuning = tuning if tuning and tuning.counts else None
    share_from = settings.share_from
    if share_from is None:
        share_from = tuning.share_from if tuning else DEFAULT_SHARE_FROM
    return msgspec.structs.replace(
        settings,
        threads=settings.threads or (tuning.threads if tuning else available_cpus()),
        prefill_chunk=settings.prefill_chunk or (tuning.ubatch if tuning else DEFAULT_CHUNK),
        numerics=settings.numerics.or_else(tuning.numerics if tuning else DEFAULT),
        share_from=share_from,
        tuning=tuning,
    )


def find_tuning(settings: EngineSettings, channel: socket.socket | None = None) -> Tuning | None:
    """The model's tuning on this machine, measured now if necessary; None if `tune` is off or measuring
    fails. Raises EOFError if `channel` is closed meanwhile."""
    if settings.tuning or not settings.tune:
        return settings.tuning
    try:
        return measure_apart(settings, channel)
    except ModelError as error:
        log.warning("measuring %s failed, defaults are used: %s", settings.path, error)
        return None


def measure_apart(
    settings: EngineSettings, channel: socket.socket | None = None, env: Mapping[str, str] | None = None
) -> Tuning:
    """Measures the model outside this process, if there is anything to measure. `env`: the environment of the
    measuring process, which must be a worker's; None: this process's. Raises ModelError; EOFError if
    `channel` is closed meanwhile, which ends the measurement."""
    return engine_kind(settings.path).measure(settings, channel, env)
