"""With what a model is run: what is set, what is remembered, what its caches were computed with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from msgspec.structs import replace

from headstart.caches.entry import Entry
from headstart.config import Settings
from headstart.engine.loading import engine_version
from headstart.messages import EngineSettings, Tuning
from headstart.service.fitting import flash_attention_of
from headstart.service.tunings import Key, Tunings

# Why it is run with its flash attention: that was set; its caches were computed so; the user agreed to it
# though they weren't; it was measured as the faster one, or will be; or nothing is measured.
Why = Literal["set", "caches", "agreed", "measured", "default"]


@dataclass(frozen=True)
class Plan:
    """`settings.tuning` is None where the worker is to measure, or measuring is turned off."""

    key: Key
    settings: EngineSettings
    why: Why

    @property
    def measures(self) -> bool:
        return self.settings.tune and self.settings.tuning is None

    def kept_back(self, tuning: Tuning) -> bool:
        """Whether measuring prefers the other flash attention, which existing caches wouldn't fit."""
        return self.why == "caches" and tuning.prefers_flash_attention != tuning.flash_attention


def make_plan(
    path: str, weights: str, settings: Settings, tunings: Tunings, entries: Sequence[Entry]
) -> Plan:
    """Never flips the flash attention that a model's caches have, unless the user wants it."""
    key = Key.here(weights, engine_version(path), settings.threads)
    asked = engine_settings(path, settings)
    if not settings.tune:
        return Plan(key, asked, "default" if settings.flash_attention is None else "set")
    flash_attention, why = _flash_attention(settings, key, tunings, entries)
    known = tunings.find(key, flash_attention)
    tuning = known.tuning if known else None
    return Plan(key, replace(asked, flash_attention=flash_attention, tuning=tuning), why)


def _flash_attention(
    settings: Settings, key: Key, tunings: Tunings, entries: Sequence[Entry]
) -> tuple[bool | None, Why]:
    if settings.flash_attention is not None:
        return settings.flash_attention, "set"
    known = tunings.find(key, None)
    if known and known.agreed:
        return known.tuning.flash_attention, "agreed"
    of_caches = flash_attention_of(entries, key.weights)
    return of_caches, "measured" if of_caches is None else "caches"


def engine_settings(path: str, settings: Settings) -> EngineSettings:
    return EngineSettings(
        path=path,
        slots=settings.slots,
        ctx=settings.ctx,
        threads=settings.threads,
        prefill_chunk=settings.prefill_chunk,
        flash_attention=settings.flash_attention,
        max_step_ms=settings.max_step_ms,
        share_from=settings.share_from,
        tune=settings.tune,
    )
