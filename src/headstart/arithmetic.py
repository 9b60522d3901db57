"""How a model's values are computed, as far as it can be chosen and changes the bytes of a state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from msgspec import Struct

# As they are in the model file, or converted to Q8_0.
Weights = Literal["file", "q8_0"]


class Arithmetic(Struct, frozen=True):
    """`None` leaves a part open: that is how it is asked for. What is computed with has no open part."""

    flash_attention: bool | None = None
    weights: Weights | None = None

    @classmethod
    def of(cls, kept: Mapping[str, str]) -> Arithmetic:
        """What a state was computed with, from the settings in its fingerprint."""
        flash_attention = {"on": True, "off": False}.get(kept.get("flash_attention", ""))
        named = kept.get("weights", "file")
        return cls(
            flash_attention, next((weights for weights in get_args(Weights) if weights == named), None)
        )

    def allows(self, other: Arithmetic) -> bool:
        return self.or_else(other) == other

    def or_else(self, other: Arithmetic) -> Arithmetic:
        """What is open here is as there."""
        return Arithmetic(
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


DEFAULT = Arithmetic(flash_attention=False, weights="file")


class Tuning(Struct, frozen=True):
    """What was measured of a model on a machine; milliseconds. One call of llama_decode, of `n` tokens after
    which a sequence holds `d`, takes pass_ms + n * (token_ms + d * attend_ms).

    `ubatch`: the smallest power of two from 16 to 256 whose prefill throughput is within 5 % of the best.
    `share_from`: tokens of a common prefix from which a unified cache decodes 4 sequences faster than
    streams; 0: never. `ranking`: all that was tried, the best first; `arithmetic`, with which all other
    figures were taken, is the first of them that was allowed. `measured`: the figures behind the choices, for
    people."""

    arithmetic: Arithmetic
    threads: int
    ubatch: int
    pass_ms: float
    token_ms: float
    attend_ms: float
    share_from: int
    ranking: list[Arithmetic]
    measured: dict[str, float]

    def best(self, allowed: Arithmetic) -> Arithmetic | None:
        """What measuring would choose; None where nothing that is allowed was tried."""
        return next((tried for tried in self.ranking if allowed.allows(tried)), None)
