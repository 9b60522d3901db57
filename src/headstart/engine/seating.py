"""How sequences get into the pool, as actions for the engine."""

from __future__ import annotations

from collections.abc import Iterator

from headstart.engine.actions import Action, Drop, Fill, Move, Start
from headstart.engine.pool import ANSWER_CELLS, Pool
from headstart.engine.sequence import Sequence, Slot
from headstart.protocol import StateRef


def join(pool: Pool, sequence: Sequence, needed: int) -> Iterator[Action]:
    """Seats one that begins with the shared prefix and needs so many cells more."""
    # Alone in the pool it computes the same bits as in a slot of its own, if nothing lies before it.
    for seat in pool.idle():
        if pool.running and pool.free >= needed:
            break
        yield Drop(seat)
    yield from _sit(pool, sequence)


def refill(pool: Pool, sequence: Sequence, origin: StateRef | Slot) -> Iterator[Action]:
    """Makes the sequence's opening, which `origin` holds, the shared prefix of a pool that nobody uses."""
    yield from _fill(pool, sequence, sequence.request.tokens[: sequence.request.boundary], origin)
    yield from _sit(pool, sequence)


def gathers(pool: Pool, parent: Sequence, n_siblings: int, share_from: int) -> bool:
    """Whether a sequence's whole prompt is to become the shared prefix, for it and its siblings."""
    assert parent.slot
    n_tokens = len(parent.slot.tokens)
    answer = min(parent.request.max_tokens, ANSWER_CELLS)
    fits = n_tokens + (1 + n_siblings) * answer <= pool.cells
    return not (parent.slot.pooled or pool.running) and n_tokens >= share_from and fits


def gather(pool: Pool, parent: Sequence) -> Iterator[Action]:
    assert parent.slot
    yield from _fill(pool, parent, parent.slot.tokens.copy(), parent.slot)
    if pool.prefix:
        yield Move(parent, pool.empty_seat(), pool.trunk)


def _fill(pool: Pool, sequence: Sequence, tokens: list[int], origin: StateRef | Slot) -> Iterator[Action]:
    for seat in pool.idle():
        yield Drop(seat)
    pool.trunk.owner = sequence.request.owner
    yield Fill(pool.trunk, tokens, origin)


def _sit(pool: Pool, sequence: Sequence) -> Iterator[Action]:
    seat = pool.empty_seat()
    if seat.tokens:
        yield Drop(seat)
    yield Start(sequence, seat, len(pool.prefix), pool.trunk if pool.prefix else None)
