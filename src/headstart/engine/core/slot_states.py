"""Fills slots with states, and keeps what they would lose."""

from __future__ import annotations

import logging
from functools import partial
from time import monotonic

from headstart.engine.core import state_file
from headstart.engine.core.actions import Fill, Move, Read, StartSequence, StateOrigin
from headstart.engine.core.scheduler import Scheduler
from headstart.engine.core.sequence import Sequence, Slot, continues
from headstart.engine.model import Model, ModelError
from headstart.engine.states.held import Checkpoint, Held
from headstart.engine.states.report import report_of
from headstart.engine.states.store import StateStore
from headstart.engine.states.tree import Match
from headstart.protocol import Forget, Source, StateRef, StoreReport

log = logging.getLogger(__name__)

# Until it is parked, a slot holds so many checkpoints.
MOST_CHECKPOINTS = 8
# An engine that has been idle for so long parks its slots, and has what is parked written.
PARK_SECONDS = 0.2
WRITE_SECONDS = 1.0
REPORT_SECONDS = 1.0
# Fewer tokens are computed again.
LEAST_PARKED = 8
# Bytes copied per millisecond, until a copy was measured.
COPY_RATE = 1e6


class SlotStates:
    """Executes the scheduler's actions. `store` None: what slots lose is lost."""

    def __init__(self, model: Model, scheduler: Scheduler, store: StateStore | None) -> None:
        self.model = model
        self.scheduler = scheduler
        self.placement = scheduler.placement
        self.store = store
        self.tidied = 0.0
        self.reported: object = None
        self.reported_at = 0.0

    # Filling

    def start(self, start: StartSequence) -> None:
        """Fills the slot of a sequence; with nothing where its origin can't be loaded."""
        sequence, slot, origin = start.sequence, start.slot, start.origin
        request = sequence.request
        sequence.placed = monotonic()
        self.keep_lost(slot, start.keep if origin is None else 0)
        before = origin if isinstance(origin, Slot) else slot if origin is None and start.keep else None
        to_disk = request.to_disk and (before is None or before.to_disk)
        if start.keep and self._load(slot, origin, sequence.tokens[: start.keep], sequence.cuts):
            sequence.source = _source(sequence, origin)
            sequence.restored_bytes = _restored_bytes(origin)
        else:
            self.clear(slot)
        slot.begin(request, sequence.cuts)
        slot.to_disk = to_disk
        sequence.computed = sequence.cached = len(slot.tokens)
        sequence.restored = monotonic()
        self.release(sequence)

    def fill(self, fill: Fill) -> None:
        """Fills the pool's prefix slot, or leaves it empty where that fails."""
        slot, origin = fill.prefix_slot, fill.origin
        slot.to_disk = origin.to_disk if isinstance(origin, Slot) else True
        slot.public = origin.public if isinstance(origin, Slot) else 0
        cuts = self.placement.chunking.cuts(len(fill.tokens), len(fill.tokens))
        if not self._load(slot, origin, fill.tokens, cuts):
            self.clear(slot)

    def move(self, move: Move) -> bool:
        """Copies the origin's state to the slot; False, leaving the slot empty, if that fails."""
        self.keep_lost(move.slot, 0)
        if not self._load(move.slot, move.origin, move.origin.tokens.copy(), []):
            self.clear(move.slot)
            return False
        move.slot.public, move.slot.to_disk = move.origin.public, move.origin.to_disk
        return True

    def drop(self, slot: Slot) -> None:
        self.keep_lost(slot, 0)
        self.clear(slot)

    def clear(self, slot: Slot) -> None:
        """Empties the slot and keeps nothing."""
        self.model.clear(slot.id)
        slot.clear()

    def _load(self, slot: Slot, origin: StateOrigin, tokens: list[int], cuts: list[int]) -> bool:
        """Loads `tokens`, with which `origin` or the slot itself begins; False if that failed. `cuts`: where
        their prefill is cut."""
        keep = len(tokens)
        if origin is None:
            slot.hold(tokens, min(slot.exact, keep), slot.boundary, slot.cuts, slot.parked)
            return self.model.cut(slot.id, keep)
        self.clear(slot)
        match origin:
            case Slot():
                exact = min(origin.exact, keep)
                slot.hold(tokens, exact, origin.boundary, origin.cuts, origin.parked)
                return self.model.copy(origin.id, slot.id, keep)
            case Match():
                stored_cuts = [cut for block in origin.blocks for cut in block.cuts or ()]
                slot.hold(tokens, origin.n_exact, keep, stored_cuts, origin.block)
                return self._restore_match(slot, origin)
            case StateRef():
                slot.hold(tokens, keep, keep, cuts)
                return self._restore_file(slot, origin, keep)

    def _restore_match(self, slot: Slot, match: Match) -> bool:
        assert self.store
        try:
            restored = self.model.restore(slot.id, *self.store.load(match))
        except ModelError as error:
            log.warning("a stored state was not restored: %s", error)
            restored = False
        if restored:
            self.store.use(match)
        else:
            self.store.remove(match.block)
        return restored

    def _restore_file(self, slot: Slot, state: StateRef, keep: int) -> bool:
        """A file that is gone or changed is no error, only a miss."""
        try:
            with state_file.mapped(state) as mapping, memoryview(mapping) as view:
                restored = self.model.restore(slot.id, view, state.offset, state.offset + state.nbytes)
                return restored and (keep == state.n_tokens or self.model.cut(slot.id, keep))
        except OSError as error:
            log.warning("state not restored from %s: %s", state.path, error)
            return False

    # Reading from the disk

    def read(self, read: Read) -> None:
        """Begins to read the blocks of a match; the sequence waits."""
        assert self.store
        assert self.store.disk
        self.release(read.sequence)
        read.sequence.reading, read.sequence.awaited = True, read.match
        self.store.pin(read.match, 1)
        missing = [block for block in read.match.blocks if not block.in_memory]
        if read.match.block not in missing:
            missing.append(read.match.block)
        self.store.disk.read(read.sequence, missing)

    def finish_transfers(self) -> None:
        """Takes what has been read, whose sequences may start, notes what has been written, and drops from
        memory what sequences that have started no longer need."""
        if self.store is None:
            return
        self.store.shrink()
        for loaded in self.store.disk.finished() if self.store.disk else ():
            self.store.accept(loaded)
            if isinstance(loaded.reader, Sequence):
                loaded.reader.reading = False

    def release(self, sequence: Sequence) -> None:
        """Lets the blocks go that the sequence waited for."""
        if sequence.awaited and self.store:
            self.store.pin(sequence.awaited, -1)
            self.store.shrink()
        sequence.awaited = None

    # Keeping

    def checkpoint(self, sequence: Sequence) -> None:
        """At a position where prefill makes a checkpoint: goes on from the state as a restore would place it,
        and keeps the part that belongs to this position alone. Raises ModelError."""
        slot = sequence.slot
        if slot is None or sequence.computed not in sequence.checkpoints:
            return
        self.model.relocate(slot.id)
        if slot.cuts and slot.cuts[-1] == sequence.computed:
            slot.cuts[-1] = -sequence.computed
        if self.store:
            lasting = sequence.checkpoints[sequence.computed]
            slot.checkpoints[sequence.computed] = Checkpoint(self.model.checkpoint(slot.id), lasting)
            if len(slot.checkpoints) > MOST_CHECKPOINTS:
                del slot.checkpoints[sorted(slot.checkpoints)[1]]

    def keep_lost(self, slot: Slot, keep: int) -> None:
        """Parks a slot that is about to lose all but its first `keep` tokens, if that is worth a copy."""
        if self.placement.n_lost(slot, keep):
            self.park(slot)

    def park(self, slot: Slot) -> None:
        """Puts the slot's state into the state store, unless copying it would make running sequences wait for
        longer than a step may take."""
        assert self.store
        if self.scheduler.running and self._copy_ms(slot) > self.placement.chunking.longest_ms:
            self.store.given_up += 1
            return
        held = Held(
            slot.tokens, slot.exact, slot.cuts, slot.owner, slot.public, slot.to_disk, slot.checkpoints
        )
        try:
            slot.parked = self.store.park(held, slot.parked, partial(self.model.save_from, slot.id))
        except ModelError as error:
            log.warning("a state was not kept: %s", error)
            slot.keeps = False
        slot.checkpoints = {}

    def _copy_ms(self, slot: Slot) -> float:
        assert self.store
        info, store = self.model.info, self.store
        rate = store.parked_bytes / store.park_ms if store.park_ms > 1 else COPY_RATE
        return (info.state_bytes + len(slot.tokens) * info.state_token_bytes) / max(rate, 1.0)

    # Idle moments

    def pause(self, idle_since: float) -> float | None:
        """Seconds until `tidy` has something to do, if the engine has been idle since then; None: it has
        nothing."""
        if self.store is None:
            return None
        if any(map(self._is_unparked, self._idle_slots())):
            return max(idle_since + PARK_SECONDS - monotonic(), 0.0)
        if self.store.unwritten:
            return max(max(idle_since, self.tidied) + WRITE_SECONDS - monotonic(), 0.0)
        return None

    def tidy(self, idle_since: float) -> None:
        """Does what is due when the engine is idle: parks one slot, or has what is parked written."""
        if self.store is None or monotonic() < idle_since + PARK_SECONDS:
            return
        for slot in sorted(self._idle_slots(), key=lambda slot: -slot.last_used):
            if self._is_unparked(slot):
                self.park(slot)
                # What could not be kept whole is tried again only after it has changed.
                slot.keeps = slot.n_parked == len(slot.tokens)
                return
        if monotonic() >= max(idle_since, self.tidied) + WRITE_SECONDS:
            self.tidied = monotonic()
            self.store.write_behind()

    def flush(self, seconds: float) -> None:
        """Parks everything and writes it to the disk, for at most so many seconds."""
        if self.store is None:
            return
        ends = monotonic() + seconds
        self.scheduler.running.clear()
        for slot in sorted(self.scheduler.places, key=lambda slot: -slot.last_used):
            if self._is_unparked(slot) and monotonic() < ends:
                self.park(slot)
        self.store.close(max(ends - monotonic(), 0.0))

    def report(self, *, busy: bool) -> StoreReport | None:
        """The store's content and counts, if they have changed: at once when the engine is idle, else at most
        once a second."""
        if self.store is None or self.store.counts == self.reported:
            return None
        if monotonic() < self.reported_at + REPORT_SECONDS and (busy or self.store.is_writing):
            return None
        self.reported, self.reported_at = self.store.counts, monotonic()
        return report_of(self.store)

    def forget(self, command: Forget) -> int:
        """Removes the states of a prompt and of what continues it from slots and store; returns the number of
        blocks removed. What a running sequence continues is removed when it ends."""
        for slot in self.scheduler.places:
            if command.owner not in (None, slot.owner) or not continues(slot.tokens, command):
                continue
            if slot.sequence:
                slot.is_forgotten = True
            else:
                self.clear(slot)
        return self.store.forget(command.owner, command.tokens, command.kept) if self.store else 0

    def _idle_slots(self) -> list[Slot]:
        return [slot for slot in self.scheduler.places if slot.sequence is None]

    def _is_unparked(self, slot: Slot) -> bool:
        return slot.keeps and len(slot.tokens) - slot.n_parked >= LEAST_PARKED


def _source(sequence: Sequence, origin: StateOrigin) -> Source:
    match origin:
        case StateRef():
            return "file"
        case Match():
            return "disk" if sequence.awaited else "memory"
    return "slot"


def _restored_bytes(origin: StateOrigin) -> int:
    match origin:
        case StateRef():
            return origin.nbytes
        case Match():
            return sum(block.n_data for block in origin.blocks) + origin.block.n_checkpoint
    return 0
