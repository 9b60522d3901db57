"""The actions that the scheduler requests from the engine."""

from __future__ import annotations

from dataclasses import dataclass

from headstart.engine.core.sequence import Sequence, Slot
from headstart.engine.states.tree import Match
from headstart.protocol import StateRef

# Where a slot gets its first tokens from: a file, the state store, another slot, or None: the slot holds
# them already.
StateOrigin = StateRef | Match | Slot | None


@dataclass(frozen=True, slots=True)
class StartSequence:
    """Start `sequence` in `slot` from the first `keep` tokens of `origin`."""

    sequence: Sequence
    slot: Slot
    keep: int
    origin: StateOrigin


@dataclass(frozen=True, slots=True)
class Fill:
    """Load `tokens`, with which `origin` begins, into the pool's shared prefix slot."""

    prefix_slot: Slot
    tokens: list[int]
    origin: StateRef | Match | Slot


@dataclass(frozen=True, slots=True)
class Drop:
    """Clear an idle pool slot."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Move:
    """Continue a running sequence in `slot`, copied from `origin`, a slot that holds all its tokens."""

    sequence: Sequence
    slot: Slot
    origin: Slot


@dataclass(frozen=True, slots=True)
class Park:
    """Keep the state of `slot` in the state store."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Read:
    """Read the blocks of `match` into memory before `sequence` starts from them."""

    sequence: Sequence
    match: Match


Action = StartSequence | Fill | Drop | Move | Park | Read
