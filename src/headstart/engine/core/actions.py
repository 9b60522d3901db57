"""The actions that the scheduler requests from the engine."""

from __future__ import annotations

from dataclasses import dataclass

from headstart.engine.core.sequence import Sequence, Slot
from headstart.protocol import StateRef

# The source of a slot's first tokens: a file, another slot, or (None) the slot itself.
Origin = StateRef | Slot | None


@dataclass(frozen=True, slots=True)
class StartSequence:
    """Start `sequence` in `slot` from the first `keep` tokens of `origin`."""

    sequence: Sequence
    slot: Slot
    keep: int
    origin: Origin


@dataclass(frozen=True, slots=True)
class Fill:
    """Load `tokens`, with which `origin` begins, into the pool's shared prefix slot."""

    prefix_slot: Slot
    tokens: list[int]
    origin: StateRef | Slot


@dataclass(frozen=True, slots=True)
class Drop:
    """Clear an idle pool slot."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Move:
    """Continue a sequence in `slot` with all tokens of `origin`: its present slot, or one with the same
    tokens."""

    sequence: Sequence
    slot: Slot
    origin: Slot


Action = StartSequence | Fill | Drop | Move
