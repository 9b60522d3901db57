"""The choices that change the bytes of a state, and the tuning measured for a model on a machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from msgspec import Meta, Struct, field

# As in the model file, or converted to Q8_0.
Weights = Literal["file", "q8_0"]


class Numerics(Struct, frozen=True):
    """The choices that change a state's bytes. `None` leaves one open, as in settings; a loaded model has
    none open."""

    flash_attention: bool | None = None
    weights: Weights | None = None

    @classmethod
    def of(cls, settings: Mapping[str, str]) -> Numerics:
        """The numerics of a state, from the settings in its fingerprint."""
        flash_attention = {"on": True, "off": False}.get(settings.get("flash_attention", ""))
        named = settings.get("weights", "file")
        return cls(
            flash_attention, next((weights for weights in get_args(Weights) if weights == named), None)
        )

    def allows(self, other: Numerics) -> bool:
        return self.or_else(other) == other

    def or_else(self, other: Numerics) -> Numerics:
        """These numerics, with open choices taken from `other`."""
        return Numerics(
            other.flash_attention if self.flash_attention is None else self.flash_attention,
            other.weights if self.weights is None else self.weights,
        )

    @property
    def is_whole(self) -> bool:
        return self.flash_attention is not None and self.weights is not None

    def shown(self) -> dict[str, str]:
        """The choices under the names of the settings; open ones by default."""
        whole = self.or_else(DEFAULT)
        return {"flash_attention": "on" if whole.flash_attention else "off", "weights": str(whole.weights)}

    def fingerprinted(self) -> dict[str, str]:
        """The choices as in a fingerprint, which omits weights "file": states are older than this choice."""
        return {name: value for name, value in self.shown().items() if value != "file"}


DEFAULT = Numerics(flash_attention=False, weights="file")


# Milliseconds, within plausible bounds: the file is untrusted.
Ms = Annotated[float, Meta(ge=0, le=1e9)]
# After this many doubtful measurements the best figures of all of them are used.
MOST_TRIES = 5
# The share of a hit's time that other numerics must save before caches are computed again for them.
GAIN = 0.10


def preferred(hits: Mapping[Numerics, float], allowed: Numerics, existing: Numerics) -> Numerics:
    """The fastest allowed numerics of `hits` (best first, with the time of a hit); but `existing`, those of
    existing caches, if the fastest saves less than a tenth."""
    best = next(tried for tried in hits if allowed.allows(tried))
    if existing in hits and allowed.allows(existing) and hits[best] > (1 - GAIN) * hits[existing]:
        return existing
    return best


class Tuning(Struct, frozen=True):
    """The measurements of a model on a machine; times in milliseconds. One call of llama_decode with `n`
    tokens, after which a sequence holds `d`, takes pass_ms + n * (token_ms + d * attend_ms).

    `ubatch`: the smallest power of two from 16 to 256 whose prefill throughput is within 5 % of the best.
    `share_from`: tokens of a common prefix from which a unified cache decodes 4 sequences faster than
    streams; 0: never. `ranking`: all measured numerics, the best first. `numerics`: the first of them that
    was allowed, or those of existing caches where none saves a tenth of a hit against them; all other figures
    were measured with it. `hits`: the time of a hit for each of `ranking`. `measured`: the figures behind the
    choices.

    `tries`: the number of measurements; 0: by a release that didn't report doubts. `doubts`: names of
    doubtful figures, with the reasons. If there are any, figures are the best of all tries. `depth`: tokens
    in the sequence, where a figure's name has a depth; another try uses as many or more."""

    # Named as in existing tuning.json files.
    numerics: Numerics = field(name="arithmetic")
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
        """Whether workers use the tuning; else another measurement is needed."""
        return not self.doubts or self.tries >= MOST_TRIES

    @property
    def is_final(self) -> bool:
        """Whether another measurement would gain nothing."""
        return self.is_sure or self.tries >= MOST_TRIES

    @property
    def doubt(self) -> str:
        """The first doubt in words; "" if there is none."""
        return next((f"{name}: {why}" for name, why in self.doubts.items()), "")

    def best(self, allowed: Numerics) -> Numerics | None:
        """The best allowed numerics; None if none of the allowed was measured."""
        return next((tried for tried in self.ranking if allowed.allows(tried)), None)
