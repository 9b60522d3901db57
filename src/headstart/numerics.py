"""How a model's values are computed, as far as it can be chosen and changes the bytes of a state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from msgspec import Meta, Struct

# As they are in the model file, or converted to Q8_0.
Weights = Literal["file", "q8_0"]


class Numerics(Struct, frozen=True):
    """`None` leaves a part open: that is how it is asked for. What is computed with has no open part."""

    flash_attention: bool | None = None
    weights: Weights | None = None

    @classmethod
    def of(cls, kept: Mapping[str, str]) -> Numerics:
        """What a state was computed with, from the settings in its fingerprint."""
        flash_attention = {"on": True, "off": False}.get(kept.get("flash_attention", ""))
        named = kept.get("weights", "file")
        return cls(
            flash_attention, next((weights for weights in get_args(Weights) if weights == named), None)
        )

    def allows(self, other: Numerics) -> bool:
        return self.or_else(other) == other

    def or_else(self, other: Numerics) -> Numerics:
        """What is open here is as there."""
        return Numerics(
            other.flash_attention if self.flash_attention is None else self.flash_attention,
            other.weights if self.weights is None else self.weights,
        )

    @property
    def is_whole(self) -> bool:
        return self.flash_attention is not None and self.weights is not None

    def shown(self) -> dict[str, str]:
        """By the names of the settings."""
        whole = self.or_else(DEFAULT)
        return {"flash_attention": "on" if whole.flash_attention else "off", "weights": str(whole.weights)}

    def kept(self) -> dict[str, str]:
        """As in a fingerprint. "file" is not named there: states are older than this choice."""
        return {name: value for name, value in self.shown().items() if value != "file"}


DEFAULT = Numerics(flash_attention=False, weights="file")


# Milliseconds, within what a sane file says.
Ms = Annotated[float, Meta(ge=0, le=1e9)]
# After so many measurements that can't be relied on, the best figures of all of them count.
MOST_TRIES = 5
# What other arithmetic has to save of a hit before caches are computed again for it.
GAIN = 0.10


def preferred(hits: Mapping[Numerics, float], allowed: Numerics, kept: Numerics) -> Numerics:
    """The first of what was tried, best first with what a hit took, that is allowed; but `kept`, which caches
    have, where that saves less than a tenth."""
    best = next(tried for tried in hits if allowed.allows(tried))
    if kept in hits and allowed.allows(kept) and hits[best] > (1 - GAIN) * hits[kept]:
        return kept
    return best


class Tuning(Struct, frozen=True):
    """What was measured of a model on a machine; milliseconds. One call of llama_decode, of `n` tokens after
    which a sequence holds `d`, takes pass_ms + n * (token_ms + d * attend_ms).

    `ubatch`: the smallest power of two from 16 to 256 whose prefill throughput is within 5 % of the best.
    `share_from`: tokens of a common prefix from which a unified cache decodes 4 sequences faster than
    streams; 0: never. `ranking`: all that was tried, the best first; `arithmetic`, with which all other
    figures were taken, is the first of them that was allowed, or what caches have where nothing saves a tenth
    of a hit against it. `hits`: what a hit took with each of the ranking. `measured`: the figures behind the
    choices.

    `tries`: how often it was measured; 0: by a release that didn't tell how sure it was. `doubts`: of figures
    that can't be relied on, why. Where there are some, figures are the best of all tries. `depth`: how many
    tokens were held where figures say so; another try holds as many, or more."""

    arithmetic: Numerics
    threads: Annotated[int, Meta(ge=1, le=4096)]
    ubatch: Annotated[int, Meta(ge=1, le=4096)]
    pass_ms: Ms
    token_ms: Ms
    attend_ms: Ms
    share_from: Annotated[int, Meta(ge=0, le=1 << 24)]
    ranking: Annotated[list[Numerics], Meta(max_length=16)]
    measured: dict[str, Ms]
    hits: Annotated[list[Ms], Meta(max_length=16)] = []
    tries: Annotated[int, Meta(ge=0, le=1000)] = 0
    doubts: dict[str, str] = {}
    depth: Annotated[int, Meta(ge=0, le=1 << 16)] = 0

    @property
    def is_sure(self) -> bool:
        return self.tries > 0 and not self.doubts

    @property
    def counts(self) -> bool:
        """Whether it is to be run with; else there is to be another try."""
        return not self.doubts or self.tries >= MOST_TRIES

    @property
    def is_final(self) -> bool:
        """Whether there is nothing to be gained by another try."""
        return self.is_sure or self.tries >= MOST_TRIES

    @property
    def doubt(self) -> str:
        """The first of its doubts, for people; "" where there are none."""
        return next((f"{name}: {why}" for name, why in self.doubts.items()), "")

    def best(self, allowed: Numerics) -> Numerics | None:
        """What measuring would choose; None where nothing that is allowed was tried."""
        return next((tried for tried in self.ranking if allowed.allows(tried)), None)
