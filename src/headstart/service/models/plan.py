"""How a model is run: from settings, stored measurements, and the numerics of its caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from headstart.caches.entry import Entry
from headstart.config.settings import Settings
from headstart.engine.converted_weights import conversions_of
from headstart.engine.kinds import engine_kind
from headstart.numerics import DEFAULT, Numerics, Tuning
from headstart.protocol import EngineSettings, RkllmSettings, Sampling
from headstart.service.models.cache_fit import numerics_of
from headstart.service.models.tuning_store import Key, Tunings

# The source of a part of the numerics. set: configured; caches: that of existing caches; agreed: the user
# accepted it although caches differ; measured: it was the fastest, or will be measured; default: nothing is
# measured.
Why = Literal["set", "caches", "agreed", "measured", "default"]


@dataclass(frozen=True)
class Plan:
    """`settings.tuning` is None if the worker is to measure, if measuring is off, or if the measurement is
    `doubted`, that is, unreliable. `given`: the configured numerics. `why`: the source of each part of the
    numerics, by the setting's name. `again`: settings for another try, or None if there is nothing to gain.
    `overrides`: caches are rebuilt with the measured numerics, whatever theirs are."""

    key: Key
    settings: EngineSettings
    given: Numerics
    why: Mapping[str, Why]
    doubted: Tuning | None = None
    again: EngineSettings | None = None
    overrides: bool = False

    @property
    def measures(self) -> bool:
        return self.settings.tune and self.settings.tuning is None

    def kept_back(self, tuning: Tuning) -> Numerics | None:
        """The numerics that measuring prefers but that existing caches wouldn't fit; None if nothing is kept
        back."""
        preferred = tuning.best(self.given)
        return preferred if "caches" in self.why.values() and preferred != tuning.numerics else None


def make_plan(
    path: str, weights: str, settings: Settings, tunings: Tunings, entries: Sequence[Entry]
) -> Plan:
    """Never changes the numerics of a model's caches unless the user wants it."""
    kind = engine_kind(path)
    key = Key.here(weights, kind.version(), settings.threads)
    if not kind.tunable:
        return Plan(key, engine_settings(path, settings), Numerics(), {})
    given = Numerics(settings.flash_attention, settings.weights)
    agreed = tunings.agreed(key) if settings.tune else None
    overriding = tunings.overriding(key) if settings.tune else None
    # `fixed` is what another measurement may not change.
    fixed: list[tuple[Why, Numerics]] = [("set", given), ("agreed", agreed or Numerics())]
    sources: list[tuple[Why, Numerics]] = [
        *fixed,
        ("measured", overriding or Numerics()),
        ("caches", numerics_of(entries, weights)),
    ]
    joined = _joined(sources)
    tuning = tunings.find(key, joined) if settings.tune else None
    doubted = tunings.doubted(key) if settings.tune and tuning is None else None
    otherwise: Why = "measured" if settings.tune and not doubted else "default"
    why = {
        part: next((why for why, source in sources if getattr(source, part) is not None), otherwise)
        for part in Numerics.__struct_fields__
    }
    base = replace(
        engine_settings(path, settings),
        numerics=joined,
        tuning=tuning,
        tune=settings.tune and doubted is None,
        conversions=conversions_of(weights, settings.cache_dir),
    )
    again = None
    if doubted or (tuning and not tuning.is_final):
        existing = joined.or_else(DEFAULT) if "caches" in why.values() else Numerics()
        tried = tunings.doubted(key)
        again = replace(base, tune=True, tuning=None, numerics=_joined(fixed), existing=existing, tried=tried)
    return Plan(key, base, given, why, doubted, again, overrides=overriding is not None)


def _joined(sources: Sequence[tuple[Why, Numerics]]) -> Numerics:
    """Joins the sources: the first one that sets a part decides it."""
    joined = Numerics()
    for _, source in sources:
        joined = joined.or_else(source)
    return joined


def engine_settings(path: str, settings: Settings) -> EngineSettings:
    """The settings that don't depend on what is known of the model."""
    return EngineSettings(
        path=path,
        slots=settings.slots,
        ctx=settings.ctx,
        threads=settings.threads,
        prefill_chunk=settings.prefill_chunk,
        max_step_ms=settings.max_step_ms,
        share_from=settings.share_from,
        tune=settings.tune and engine_kind(path).tunable,
        rkllm=rkllm_settings(settings),
    )


def rkllm_settings(settings: Settings) -> RkllmSettings:
    return RkllmSettings(
        library=str(Path(settings.rkllm_library).expanduser().absolute()) if settings.rkllm_library else "",
        abi=settings.rkllm_abi,
        cpus=settings.rkllm_cpus,
        cpu_mask=settings.rkllm_cpu_mask,
        embed_flash=settings.rkllm_embed_flash,
        log_level=settings.rkllm_log_level,
        sampling=Sampling(**settings.rkllm_sampling.model_dump()),
    )
