"""Chooses where a sequence starts: in which slot, and from which state."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from headstart.engine.core.actions import StateOrigin
from headstart.engine.core.chunking import Chunking, checkpoints
from headstart.engine.core.sequence import Sequence, Slot, reusable
from headstart.engine.states.store import StateStore
from headstart.engine.states.tree import Lookup, Match
from headstart.protocol import StateRef, Submit
from headstart.tokens import common_prefix

# A state of n tokens is copied to keep so many: the larger of the two, at most half a chunk. Copying n tokens
# takes about as long as computing a hundredth of them.
LEAST_KEPT = 16
LEAST_SHARE = 32


@dataclass(frozen=True, slots=True)
class Place:
    """A sequence starts in `slot` with the first `keep` tokens of `origin`."""

    slot: Slot
    keep: int
    origin: StateOrigin


class Placement:
    """`store` None: nothing is stored, and slots are overwritten."""

    def __init__(
        self, slots: list[Slot], chunking: Chunking, *, can_cut: bool, store: StateStore | None
    ) -> None:
        self.slots = slots
        self.chunking = chunking
        self.can_cut = can_cut
        self.store = store

    def idle(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.sequence is None]

    def held(self, request: Submit) -> tuple[int, Slot]:
        """The idle slot that holds most of the request's prefix, and the number of tokens to use of it."""
        choices = (
            (reusable(slot, request, self.chunking, can_cut=self.can_cut), slot) for slot in self.idle()
        )
        return max(choices, key=lambda choice: (choice[0], -self.n_lost(choice[1], choice[0])))

    def prepare(self, sequence: Sequence) -> None:
        """Plans the sequence's prefill; call it once, before it may start."""
        request = sequence.request
        cuts = self.chunking.cuts(request.boundary, sequence.n_prompt)
        if not self.can_cut:
            sequence.checkpoints = checkpoints(cuts, request.boundary, generates=bool(request.max_tokens))
        sequence.cuts = [-cut if cut in sequence.checkpoints else cut for cut in cuts]
        if self.store and request.reuse:
            sequence.lookup = Lookup(
                array("i", request.tokens),
                sequence.n_prompt - 1,
                request.owner,
                request.public,
                sequence.cuts,
                exact=bool(request.save_to),
                whole=not self.can_cut,
            )

    def stored(self, sequence: Sequence) -> Match | None:
        """The longest prefix of the sequence's prompt in the state store."""
        if self.store is None or sequence.lookup is None:
            return None
        return self.store.find(sequence.lookup)

    @contextmanager
    def pinned(self, sequence: Sequence) -> Iterator[None]:
        """Keeps in memory what the store has of the sequence's prompt: the slot that it starts in is parked
        first, which takes room."""
        match = self.stored(sequence)
        if self.store is None or match is None:
            yield
            return
        self.store.pin(match, 1)
        try:
            yield
        finally:
            self.store.pin(match, -1)

    def n_lost(self, slot: Slot, keep: int) -> int:
        """The number of tokens whose values would be lost if the slot kept only the first `keep`; 0 if they
        aren't worth a copy of its state."""
        if self.store is None or not slot.keeps:
            return 0
        n_tokens = len(slot.tokens)
        lost = n_tokens - max(keep, slot.n_parked)
        least = min(n_tokens // LEAST_SHARE, self.chunking.size(n_tokens) // 2)
        return lost if lost >= max(LEAST_KEPT, least) else 0

    def victim(self) -> Slot:
        """The idle slot to overwrite: an empty one, else one that holds nothing which isn't stored, else the
        longest unused."""
        return min(
            self.idle(), key=lambda slot: (bool(slot.tokens), self.n_lost(slot, 0) > 0, slot.last_used)
        )

    def choose(self, sequence: Sequence, origin: StateRef | Slot | None, usable: int) -> Place:
        """`origin`: a file or slot that holds `usable` tokens of the request's cached prefix. The longest
        prefix counts; among equals, what takes least time and loses nothing."""
        keep, slot = self.held(sequence.request)
        match = self.stored(sequence)
        loses = self.n_lost(slot, keep) > 0
        choices: list[tuple[int, int, StateOrigin]] = [(keep, 1 if loses else 4, None)]
        if match:
            choices.append((match.n_tokens, 3 if match.in_memory else 0, match))
        if origin is not None and usable > 0:
            choices.append((usable, 2, origin))
        n, _, best = max(choices, key=lambda choice: choice[:2])
        if best is not None:
            victim = self.victim()
            return Place(victim, n, None if best is victim else best)
        if not keep:
            return Place(self.victim(), 0, None)
        other = self.victim()
        if loses and self.can_cut and other is not slot and not self.n_lost(other, 0):
            return Place(other, keep, slot)
        return Place(slot, keep, None)

    def continued(self, sequence: Sequence) -> Iterator[Slot]:
        """Idle slots that begin as the request does, where it could start from a checkpoint if they were
        parked."""
        request = sequence.request
        if self.can_cut or self.store is None or not request.reuse:
            return
        held, match = self.held(request)[0], self.stored(sequence)
        best = max(held, match.n_tokens if match else 0)
        for slot in self.idle():
            shared = common_prefix(slot.tokens, request.tokens)
            at = max((at for at in slot.checkpoints if at <= shared), default=0)
            if slot.keeps and best < at < len(slot.tokens) and slot.n_parked < len(slot.tokens):
                yield slot

    def prefix(self, sequence: Sequence) -> Match | None:
        """The sequence's whole cached prefix in the state store, exact, in memory."""
        boundary = sequence.request.boundary
        if not (0 < boundary < sequence.n_prompt and self.can_cut):
            return None
        match = self.stored(sequence)
        if match is None or match.n_exact < boundary:
            return None
        block = next(block for block in match.blocks if block.end >= boundary)
        found = replace(match, block=block, n_tokens=boundary, n_exact=boundary)
        return found if found.in_memory else None
