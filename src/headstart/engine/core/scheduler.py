"""Decides, and only decides: no I/O, no clock, no native call.

There is no prefill phase and no decode phase: every running sequence has tokens that are not computed yet.
Sequences past their prompt have one, and decode in one batch; the others take turns for the prompt tokens of
a step, at most one chunk each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from headstart.engine.core.actions import Action, Drop, Move, Park, Read, StartSequence, StateOrigin
from headstart.engine.core.chunking import Chunking
from headstart.engine.core.placement import Place, Placement
from headstart.engine.core.pool import ANSWER_CELLS, Pool, join, refill, share_prompt, shares_prompt
from headstart.engine.core.sequence import Sequence, Slot, may_share
from headstart.engine.model import Piece
from headstart.engine.states.store import StateStore
from headstart.engine.states.tree import Match
from headstart.protocol import StateRef, Submit

Work = list[tuple[Sequence, Piece]]


class Scheduler:
    """`step_tokens`: the most prompt tokens of a step. `share_from`: the number of common tokens from which
    sequences run in the pool; 0: never. The caller must execute each action of an iterator before taking the
    next."""

    def __init__(
        self,
        n_slots: int,
        chunking: Chunking,
        *,
        step_tokens: int,
        can_cut: bool = True,
        pool_cells: int = 0,
        share_from: int = 0,
        store: StateStore | None = None,
    ) -> None:
        self.chunking = chunking
        self.step_tokens = step_tokens
        self.can_cut = can_cut
        self.share_from = share_from
        self.slots = [Slot(i) for i in range(n_slots)]
        self.pool = Pool(n_slots, pool_cells) if pool_cells and share_from and can_cut else None
        self.placement = Placement(self.slots, chunking, can_cut=can_cut, store=store)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.step = 0

    @property
    def busy(self) -> bool:
        return bool(self.running) or any(sequence.may_start for sequence in self.waiting)

    def add(self, sequence: Sequence) -> None:
        self.placement.prepare(sequence)
        self.waiting.append(sequence)

    def find(self, request_id: int) -> Sequence | None:
        for sequence in (*self.running, *self.waiting):
            if request_id in sequence.ids:
                return sequence
        return None

    def admit(self) -> Iterator[Action]:
        """Starts waiting sequences, first come, first served, as long as there is a slot for each of their
        answers. A sequence whose prefix another one is computing waits for it."""
        self.step += 1
        for sequence in list(self.waiting):
            n_taken = sum(len(other.ids) for other in self.running)
            if n_taken == len(self.slots):
                return
            if not sequence.may_start or self._is_being_computed(sequence):
                continue
            if n_taken + len(sequence.ids) > len(self.slots):
                return
            for slot in self.placement.continued(sequence):
                yield Park(slot)
            place = self._place(sequence)
            actions = self._start_in_pool(self.pool, sequence, place.keep) if self.pool else None
            if actions is None and isinstance(place.origin, Match) and not place.origin.in_memory:
                yield Read(sequence, place.origin)
                continue
            self.waiting.remove(sequence)
            with self.placement.pinned(sequence):
                for action in actions or [StartSequence(sequence, place.slot, place.keep, place.origin)]:
                    yield action
                    if isinstance(action, StartSequence):
                        self._take(sequence, action.slot)

    def _take(self, sequence: Sequence, slot: Slot) -> None:
        slot.sequence = sequence
        slot.owner = sequence.request.owner
        sequence.slot = slot
        if sequence not in self.running:
            self.running.append(sequence)

    def _place(self, sequence: Sequence) -> Place:
        origin = self._origin(sequence)
        usable = self._usable(origin, sequence.request) if origin else 0
        return self.placement.choose(sequence, origin, usable)

    def _origin(self, sequence: Sequence) -> StateRef | Slot | None:
        """The state or slot from which the sequence can start: one with its whole cached prefix, else one
        with the beginning of it."""
        request = sequence.request
        if not request.reuse:
            return None
        if self._restores_whole(request):
            return request.restore
        return self._holder(request) or request.restore

    def _usable(self, origin: StateOrigin, request: Submit) -> int:
        """The number of usable tokens of `origin`: a state, or a slot that holds the whole cached prefix."""
        if not isinstance(origin, StateRef):
            return request.boundary
        if request.shared is None:
            return min(origin.n_tokens, request.boundary)
        # Before both boundaries, both prefills are cut on the same grid.
        return self.chunking.last(0, min(request.shared, request.boundary)) if self.can_cut else 0

    def _restores_whole(self, request: Submit) -> bool:
        return bool(request.restore) and self._usable(request.restore, request) == request.boundary

    def restores(self, sequence: Sequence) -> StateRef | None:
        """The state from which the sequence would be restored now; None if an idle slot or the pool serves it
        better."""
        request = sequence.request
        if request.restore is None or not request.reuse:
            return None
        if self.pool and self.pool.holds_prefix(request):
            return None
        held = self.placement.held(request)[0] if self.placement.idle() else 0
        match = self.placement.stored(sequence)
        known = max(held, match.n_tokens if match else 0)
        return request.restore if known < self._usable(request.restore, request) else None

    def _holder(self, request: Submit) -> Slot | None:
        """A slot, idle or in use, that holds the exact values of the request's cached prefix."""
        tokens, boundary = request.tokens, request.boundary
        if not (0 < boundary < len(tokens) and self.can_cut):
            return None
        places = (*self.slots, self.pool.prefix_slot) if self.pool else self.slots
        for slot in places:
            holds = slot.boundary == boundary <= slot.exact and slot.tokens[:boundary] == tokens[:boundary]
            if holds and may_share(slot.owner, request):
                return slot
        return None

    def _is_being_computed(self, sequence: Sequence) -> bool:
        request = sequence.request
        if not (request.reuse and request.boundary and self.can_cut) or self._restores_whole(request):
            return False
        if request.save_to or self._holder(request) or self.placement.prefix(sequence):
            return False
        behind = (other for other in self.running if other.computed < request.boundary)
        return any(other.shares_prefix_with(sequence) for other in behind)

    def _start_in_pool(self, pool: Pool, sequence: Sequence, keep: int) -> Iterator[Action] | None:
        """The actions that start the sequence in the pool; None if a slot of its own is better. `keep`: the
        number of its tokens that a free slot holds already."""
        request, boundary = sequence.request, sequence.request.boundary
        if not request.reuse or not request.max_tokens or boundary < self.share_from:
            return None
        shares = pool.holds_prefix(request) and may_share(pool.prefix_slot.owner, request)
        if shares and (slot := pool.continued_by(sequence)) and len(slot.tokens) > keep:
            return iter([StartSequence(sequence, slot, len(slot.tokens), None)])
        if keep > boundary or (keep == boundary and not pool.running and not self._has_company(sequence)):
            return None
        if not shares:
            origin = self.placement.prefix(sequence) or self._origin(sequence)
            if pool.running or origin is None or self._usable(origin, request) < boundary:
                return None
            return refill(pool, sequence, origin) if self._has_company(sequence) else None
        needed = sequence.n_prompt - boundary + ANSWER_CELLS
        if needed > pool.cells - len(pool.prefix) - pool.in_use:
            return None
        return join(pool, sequence, needed)

    def _has_company(self, sequence: Sequence) -> bool:
        """Whether another sequence could use the same prefix now."""
        others = (other for other in (*self.running, *self.waiting) if other is not sequence)
        return any(other.request.max_tokens and other.shares_prefix_with(sequence) for other in others)

    def relieve(self) -> Iterator[Action]:
        """Keeps idle pool slots within bounds, and the next batch of the pool within its cells."""
        if not (pool := self.pool):
            return
        if pool.running:
            for slot in pool.excess():
                yield Drop(slot)
        while (members := self._members()) and pool.free < _n_tokens(self.pooled()):
            if idle := pool.idle():
                yield Drop(idle[0])
                continue
            sequence = max(members, key=lambda member: member.arrived)
            assert sequence.slot is not None
            yield Move(sequence, self.placement.victim(), sequence.slot)

    def moved(self, sequence: Sequence, slot: Slot) -> None:
        if sequence.slot:
            sequence.slot.sequence = None
        self._take(sequence, slot)

    def place(self, siblings: list[Sequence], parent: Sequence) -> Iterator[Action]:
        """Gives each sibling a slot with all tokens of the parent's: in the pool if possible, where they use
        the same cells. Slots were kept free for them."""
        if not siblings:
            return
        if self.pool and shares_prompt(self.pool, parent, len(siblings), self.share_from):
            yield from share_prompt(self.pool, parent)
        for sibling in siblings:
            if parent.slot is None or parent not in self.running:
                return
            if self.pool and parent.slot.pooled:
                slot = self.pool.empty_slot()
                if slot.tokens:
                    yield Drop(slot)
                yield Move(sibling, slot, parent.slot)
            else:
                yield Move(sibling, self.placement.victim(), parent.slot)

    def _members(self) -> list[Sequence]:
        return [sequence for sequence in self.running if sequence.slot and sequence.slot.pooled]

    def decoding(self) -> Work:
        """One token of each sequence outside the pool that is past its prompt."""
        return self._pieces(s for s in self._unpooled() if not s.is_prefilling)

    def prefilling(self) -> Work:
        """Whole chunks of prefilling sequences outside the pool, within the bounds of a step; the sequence
        served longest ago comes first."""
        return self._chunks(s for s in self._unpooled() if s.is_prefilling)

    def pooled(self) -> Work:
        """The next tokens of all sequences in the pool: there a mixed batch costs less than two."""
        members = self._members()
        return self._pieces(s for s in members if not s.is_prefilling) + self._chunks(
            s for s in members if s.is_prefilling
        )

    def _unpooled(self) -> list[Sequence]:
        return [sequence for sequence in self.running if sequence.slot and not sequence.slot.pooled]

    def _pieces(self, sequences: Iterable[Sequence]) -> Work:
        return [(sequence, sequence.next_piece(self.chunking)) for sequence in sequences]

    def _chunks(self, sequences: Iterable[Sequence]) -> Work:
        work: Work = []
        n_left, ms_left = self.step_tokens, self.chunking.longest_ms
        for sequence in sorted(sequences, key=lambda sequence: sequence.last_step):
            piece = sequence.next_piece(self.chunking)
            cost = self.chunking.cost(piece.start, len(piece.tokens))
            if len(piece.tokens) <= n_left and (cost <= ms_left or not work):
                n_left -= len(piece.tokens)
                ms_left -= cost
                work.append((sequence, piece))
        return work

    def served(self, work: Work) -> None:
        """Records that the pieces were evaluated in this step."""
        for sequence, _ in work:
            sequence.last_step = self.step

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence; its slot becomes free, and keeps its state for later requests."""
        if sequence.slot is None:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        sequence.slot.sequence = None
        sequence.slot.last_used = self.step

    @property
    def places(self) -> list[Slot]:
        """All slots of sequences, also those of the pool."""
        return [*self.slots, *(self.pool.slots if self.pool else ())]

    def check_integrity(self) -> None:
        """Asserts invariants that hold between steps. Tests call it after each step, as does an engine that
        logs at level DEBUG."""
        assert {id(s.slot) for s in self.running} == {id(s) for s in self.places if s.sequence}
        assert sum(len(sequence.ids) for sequence in self.running) <= len(self.slots)
        for sequence in self.running:
            slot = sequence.slot
            assert slot is not None
            assert slot.sequence is sequence
            assert slot.tokens == sequence.tokens[: sequence.computed]
            assert slot.exact <= len(slot.tokens)
        if self.pool:
            assert self.pool.free >= 0
            n = len(self.pool.prefix)
            assert all(slot.tokens[:n] == self.pool.prefix for slot in self.pool.slots if slot.tokens)


def _n_tokens(work: Work) -> int:
    return sum(len(piece.tokens) for _, piece in work)
