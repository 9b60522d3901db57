"""Resolves a worker's open settings: from its tuning, by measuring, or by defaults."""

from __future__ import annotations

import logging
import selectors
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import get_args

import msgspec

from headstart.engine.kinds import only_embeds
from headstart.engine.model import ModelError
from headstart.machine import available_cpus
from headstart.numerics import DEFAULT, Numerics, Tuning, Weights, preferred
from headstart.protocol import EngineSettings
from headstart.toyspec import ToySpec

log = logging.getLogger(__name__)

DEFAULT_CHUNK = 64
DEFAULT_SHARE_FROM = 256
# The toy model has no speed to measure.
TOY = Tuning(
    arithmetic=DEFAULT,
    threads=1,
    ubatch=DEFAULT_CHUNK,
    pass_ms=0.0,
    token_ms=0.0,
    attend_ms=0.0,
    share_from=DEFAULT_SHARE_FROM,
    ranking=[Numerics(on, weights) for on in (False, True) for weights in get_args(Weights)],
    measured={},
    hits=[80.0, 80.0, 100.0, 100.0],
    tries=1,
)


def settled(settings: EngineSettings, tuning: Tuning | None) -> EngineSettings:
    """The settings with nothing left open. A tuning that doesn't count is not used."""
    tuning = tuning if tuning and tuning.counts else None
    share_from = settings.share_from
    if share_from is None:
        share_from = tuning.share_from if tuning else DEFAULT_SHARE_FROM
    return msgspec.structs.replace(
        settings,
        threads=settings.threads or (tuning.threads if tuning else available_cpus()),
        prefill_chunk=settings.prefill_chunk or (tuning.ubatch if tuning else DEFAULT_CHUNK),
        arithmetic=settings.arithmetic.or_else(tuning.arithmetic if tuning else DEFAULT),
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
    """Measures in a process of its own: its memory is certainly free afterwards, and if it needs too much or
    crashes, the model can still run. `env`: its environment, which must be a worker's; None: this process's.
    Raises ModelError; EOFError if `channel` is closed meanwhile, which ends the measurement."""
    if ToySpec.matches(settings.path):
        return _of_toy(settings)
    if only_embeds(settings.path):
        # Only generation is measured.
        chosen = settings.arithmetic.or_else(DEFAULT)
        return msgspec.structs.replace(TOY, arithmetic=chosen, threads=available_cpus())
    process = subprocess.Popen(
        # -P: don't import modules from the current folder.
        [
            sys.executable,
            "-P",
            "-m",
            "headstart.engine.tuning.measure",
            msgspec.json.encode(settings).decode(),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=env,
    )
    assert process.stdout
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if channel is not None:
                # The server sends nothing before the worker is ready: readable means closed.
                selector.register(channel, selectors.EVENT_READ)
            if all(key.fileobj is not process.stdout for key, _ in selector.select()):
                raise EOFError
        answer = process.stdout.read()
        status = process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    if status != 0:
        raise ModelError(f"the measuring process ended with status {status}")
    try:
        return msgspec.json.decode(answer, type=Tuning)
    except msgspec.MsgspecError as error:
        raise ModelError(f"the measuring process said what is no tuning: {error}") from error


def _of_toy(settings: EngineSettings) -> Tuning:
    """The measurement's result for a toy model, by the switches in its path."""
    spec = ToySpec.parse(settings.path)
    tries = 1 + (settings.tried.tries if settings.tried else 0)
    ranking = sorted(TOY.ranking, key=lambda tried: bool(tried.flash_attention) != bool(spec.attention))
    hits = dict(zip(ranking, TOY.hits, strict=True))
    return msgspec.structs.replace(
        TOY,
        arithmetic=preferred(hits, settings.arithmetic, settings.kept),
        ranking=ranking,
        hits=[*hits.values()],
        tries=tries,
        doubts={"1 token": "other programs used 2.0 CPUs"} if tries <= spec.busy else {},
    )
