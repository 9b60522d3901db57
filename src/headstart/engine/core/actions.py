"""What the scheduler asks of the engine."""

from __future__ import annotations

from dataclasses import dataclass

from headstart.engine.core.sequence import Sequence, Slot
from headstart.protocol import StateRef

# Where a slot's first tokens come from: a file, another slot, or (None) what it holds already.
Origin = StateRef | Slot | None


@dataclass(frozen=True, slots=True)
class Start:
    """Start `sequence` in `slot` from the first `keep` tokens of `origin`."""

    sequence: Sequence
    slot: Slot
    keep: int
    origin: Origin


@dataclass(frozen=True, slots=True)
class Fill:
    """Let the pool's trunk hold `tokens`, which `origin` begins with."""

    trunk: Slot
    tokens: list[int]
    origin: StateRef | Slot


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget what an idle seat of the pool holds."""

    seat: Slot


@dataclass(frozen=True, slots=True)
class Move:
    """Let a sequence go on in `slot` with all that `origin` holds: its own place until now, or one that holds
    the same."""

    sequence: Sequence
    slot: Slot
    origin: Slot


Action = Start | Fill | Drop | Move
