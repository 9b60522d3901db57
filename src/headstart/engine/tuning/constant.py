"""Tunings of models that have no speed to measure."""

from __future__ import annotations

from typing import get_args

import msgspec

from headstart.machine import available_cpus
from headstart.numerics import DEFAULT, Numerics, Tuning, Weights, preferred
from headstart.protocol import EngineSettings
from headstart.toyspec import ToySpec

DEFAULT_CHUNK = 64
DEFAULT_SHARE_FROM = 256
TOY = Tuning(
    numerics=DEFAULT,
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


def embedder_tuning(settings: EngineSettings) -> Tuning:
    """The tuning of a model that only makes embeddings: only generation is measured."""
    chosen = settings.numerics.or_else(DEFAULT)
    return msgspec.structs.replace(TOY, numerics=chosen, threads=available_cpus())


def toy_tuning(settings: EngineSettings) -> Tuning:
    """The measurement's result for a toy model, by the switches in its path."""
    spec = ToySpec.parse(settings.path)
    tries = 1 + (settings.tried.tries if settings.tried else 0)
    ranking = sorted(TOY.ranking, key=lambda tried: bool(tried.flash_attention) != bool(spec.attention))
    hits = dict(zip(ranking, TOY.hits, strict=True))
    return msgspec.structs.replace(
        TOY,
        numerics=preferred(hits, settings.numerics, settings.existing),
        ranking=ranking,
        hits=[*hits.values()],
        tries=tries,
        doubts={"1 token": "other programs used 2.0 CPUs"} if tries <= spec.busy else {},
    )
