"""The pool: one KV cache in which running sequences with a common prefix store that prefix once.

Decoding several sequences reads a shared prefix's cells once for all of them, but each token also pays for
every other used cell. So the pool holds a single prefix at a time, and the remains of ended sequences are
dropped when they exceed a small bound. Sequences with nothing to share run in their slots' own KV streams.
"""

from __future__ import annotations

from collections.abc import Iterator

from headstart.engine.core.actions import Action, Drop, Fill, Move, StartSequence
from headstart.engine.core.sequence import Sequence, Slot
from headstart.engine.states.tree import Match
from headstart.protocol import StateRef, Submit

# The most cells of ended sequences while others run; with a long prefix, up to an eighth of it.
IDLE_CELLS = 128
# Cells reserved for the first tokens of an answer; more are freed when needed.
ANSWER_CELLS = 64


class Pool:
    """Bookkeeping only. `prefix_slot` holds the shared prefix, `slots` hold sequences that begin with it."""

    def __init__(self, n_slots: int, cells: int) -> None:
        self.cells = cells
        self.slots = [Slot(n_slots + i, pooled=True) for i in range(n_slots)]
        self.prefix_slot = Slot(2 * n_slots, pooled=True)

    @property
    def prefix(self) -> list[int]:
        return self.prefix_slot.tokens

    def holds_prefix(self, request: Submit) -> bool:
        """Whether the shared prefix is the request's cached prefix, prefilled with the same boundary."""
        boundary = request.boundary
        return self.prefix_slot.boundary == boundary and self.prefix == request.tokens[:boundary]

    @property
    def running(self) -> bool:
        return any(slot.sequence for slot in self.slots)

    @property
    def free(self) -> int:
        return self.cells - len(self.prefix) - sum(map(self._own_cells, self.slots))

    @property
    def in_use(self) -> int:
        """The number of cells that running sequences have beyond the shared prefix."""
        return sum(self._own_cells(slot) for slot in self.slots if slot.sequence)

    def _own_cells(self, slot: Slot) -> int:
        return max(len(slot.tokens) - len(self.prefix), 0)

    def idle(self) -> list[Slot]:
        """Pool slots that hold the state of ended sequences, the longest unused first."""
        left = (slot for slot in self.slots if slot.tokens and not slot.sequence)
        return sorted(left, key=lambda slot: slot.last_used)

    def excess(self) -> Iterator[Slot]:
        """Idle pool slots to drop, because running sequences pay for their cells."""
        idle = self.idle()
        while idle and sum(map(self._own_cells, idle)) > max(IDLE_CELLS, len(self.prefix) // 8):
            yield idle.pop(0)

    def continued_by(self, sequence: Sequence) -> Slot | None:
        """An idle pool slot with whose tokens the sequence begins: a continued conversation."""
        tokens = sequence.request.tokens
        for slot in self.idle():
            n = len(slot.tokens)
            is_theirs = slot.owner == sequence.request.owner
            if is_theirs and len(self.prefix) < n < len(tokens) and slot.tokens == tokens[:n]:
                return slot
        return None

    def empty_slot(self) -> Slot:
        """An empty pool slot; if there is none, the longest unused idle one."""
        return (
            next((slot for slot in self.slots if not slot.tokens and not slot.sequence), None)
            or self.idle()[0]
        )


def join(pool: Pool, sequence: Sequence, needed: int) -> Iterator[Action]:
    """Starts a sequence that begins with the shared prefix in a pool slot; it needs `needed` more cells."""
    # Alone in the pool, with no idle cells before its own, it computes the same bits as in a slot of its own.
    for slot in pool.idle():
        if pool.running and pool.free >= needed:
            break
        yield Drop(slot)
    yield from _start(pool, sequence)


def refill(pool: Pool, sequence: Sequence, origin: StateRef | Match | Slot) -> Iterator[Action]:
    """Makes the sequence's cached prefix, which `origin` holds, the shared prefix; no sequence may run in the
    pool."""
    yield from _fill(pool, sequence, sequence.request.tokens[: sequence.request.boundary], origin)
    yield from _start(pool, sequence)


def shares_prompt(pool: Pool, parent: Sequence, n_siblings: int, share_from: int) -> bool:
    """Whether the whole prompt of a sequence should become the shared prefix, for it and its siblings."""
    assert parent.slot
    n_tokens = len(parent.slot.tokens)
    answer = min(parent.request.max_tokens, ANSWER_CELLS)
    fits = n_tokens + (1 + n_siblings) * answer <= pool.cells
    return not (parent.slot.pooled or pool.running) and n_tokens >= share_from and fits


def share_prompt(pool: Pool, parent: Sequence) -> Iterator[Action]:
    assert parent.slot
    yield from _fill(pool, parent, parent.slot.tokens.copy(), parent.slot)
    if pool.prefix:
        yield Move(parent, pool.empty_slot(), pool.prefix_slot)


def _fill(
    pool: Pool, sequence: Sequence, tokens: list[int], origin: StateRef | Match | Slot
) -> Iterator[Action]:
    for slot in pool.idle():
        yield Drop(slot)
    pool.prefix_slot.owner = sequence.request.owner
    yield Fill(pool.prefix_slot, tokens, origin)


def _start(pool: Pool, sequence: Sequence) -> Iterator[Action]:
    slot = pool.empty_slot()
    if slot.tokens:
        yield Drop(slot)
    yield StartSequence(sequence, slot, len(pool.prefix), pool.prefix_slot if pool.prefix else None)
