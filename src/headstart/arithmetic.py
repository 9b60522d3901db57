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
