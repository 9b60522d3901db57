"""Decides, and only decides: no I/O, no clock, no native call.

There is no prefill phase and no decode phase: every running sequence has tokens that are not computed yet.
Those with one, all sharing a batch, are decoding; the others take turns for `chunk` prompt tokens a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from headstart.engine.model import Piece
from headstart.engine.sequence import Sequence, Slot, reusable
from headstart.messages import StateRef

Work = list[tuple[Sequence, Piece]]


@dataclass(frozen=True, slots=True)
class Placement:
    """Start `sequence` in `slot` from the first `keep` tokens of what the slot holds, or of `restore`."""

    sequence: Sequence
    slot: Slot
    keep: int
    restore: StateRef | None


class Scheduler:
    def __init__(self, n_slots: int, chunk: int, *, can_cut: bool) -> None:
        self.chunk = chunk
        self.can_cut = can_cut
        self.slots = [Slot(i) for i in range(n_slots)]
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.step = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def find(self, request_id: int) -> Sequence | None:
        for sequence in (*self.running, *self.waiting):
            if sequence.request.id == request_id:
                return sequence
        return None

    def admit(self) -> Iterator[Placement]:
        """Gives waiting sequences slots, first come first served, as long as there are free ones."""
        self.step += 1
        while self.waiting and (idle := [slot for slot in self.slots if slot.sequence is None]):
            sequence = self.waiting.popleft()
            placement = self._place(sequence, idle)
            placement.slot.sequence = sequence
            sequence.slot = placement.slot
            self.running.append(sequence)
            yield placement

    def _place(self, sequence: Sequence, idle: list[Slot]) -> Placement:
        request = sequence.request

        def kept(slot: Slot) -> int:
            return reusable(slot, request, self.chunk, can_cut=self.can_cut)

        best = max(idle, key=kept)
        keep = kept(best)
        restore = request.restore
        if restore and request.reuse and (usable := min(restore.n_tokens, request.boundary)) > keep:
            return Placement(sequence, _least_useful(idle), usable, restore)
        if keep:
            return Placement(sequence, best, keep, None)
        return Placement(sequence, _least_useful(idle), 0, None)

    def decoding(self) -> Work:
        """One token of each sequence that has its prompt behind it."""
        return [
            (sequence, sequence.next_piece(self.chunk))
            for sequence in self.running
            if not sequence.is_prefilling
        ]

    def prefilling(self) -> Work:
        """Whole chunks of up to `chunk` tokens in all, the sequence served longest ago first."""
        work: Work = []
        budget = self.chunk
        for sequence in sorted(self.running, key=lambda sequence: sequence.last_step):
            if not sequence.is_prefilling:
                continue
            piece = sequence.next_piece(self.chunk)
            if len(piece.tokens) <= budget:
                sequence.last_step = self.step
                budget -= len(piece.tokens)
                work.append((sequence, piece))
        return work

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence; its slot is free, and keeps what it holds for later requests."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        sequence.slot.sequence = None
        sequence.slot.last_used = self.step

    def check_integrity(self) -> None:
        """Holds whenever no step is running; called by tests and when the engine becomes idle."""
        assert {id(s.slot) for s in self.running} == {id(s) for s in self.slots if s.sequence}
        for sequence in self.running:
            slot = sequence.slot
            assert slot is not None
            assert slot.sequence is sequence
            assert slot.tokens == sequence.tokens[: sequence.computed]
            assert slot.exact <= len(slot.tokens)


def _least_useful(idle: list[Slot]) -> Slot:
    return min(idle, key=lambda slot: (bool(slot.tokens), slot.last_used))
