"""The engine: one step places waiting sequences, evaluates a batch, samples, and tells what happened."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from time import monotonic

from headstart.engine import state_file
from headstart.engine.actions import Action, Drop, Fill, Move, Start
from headstart.engine.compiling import Compiler
from headstart.engine.cuts import Cuts
from headstart.engine.grammar import GrammarError
from headstart.engine.model import Model, ModelError
from headstart.engine.reading import Reader
from headstart.engine.scheduler import Scheduler, Work
from headstart.engine.sequence import Sequence, Slot
from headstart.messages import (
    Cancel,
    Command,
    Failed,
    FailureKind,
    Finished,
    FinishReason,
    Progress,
    RequestEvent,
    SaveTo,
    StateRef,
    Stats,
    Submit,
    Token,
)

log = logging.getLogger(__name__)


class Engine:
    """Runs sequences on a model. Every submitted request ends in exactly one Finished or Failed event.

    Disks are waited for on other threads. `wake` is called from these when a step has something new to do: a
    state was written, or one that a sequence waits for is in memory, or its grammar is compiled.
    """

    def __init__(self, model: Model, cuts: Cuts, wake: Callable[[], object], *, share_from: int = 0) -> None:
        self.model = model
        self.scheduler = Scheduler(
            model.info.slots,
            cuts,
            step_tokens=model.info.step_tokens,
            can_cut=model.info.can_cut,
            pool_cells=model.info.pool_tokens,
            share_from=share_from,
        )
        self.events: list[RequestEvent] = []
        self.wake = wake
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="state-writer")
        self.written: SimpleQueue[RequestEvent] = SimpleQueue()
        self.reader = Reader(wake)
        self.compiler = Compiler(model.grammars, wake)

    @property
    def busy(self) -> bool:
        return self.scheduler.busy

    def handle(self, command: Command) -> None:
        match command:
            case Submit():
                self._add(Sequence(command, list(command.tokens), monotonic()))
            case Cancel(id=request_id):
                if sequence := self.scheduler.find(request_id):
                    self._finish(sequence, "cancelled")

    def _add(self, sequence: Sequence) -> None:
        """Where others run, a state that isn't in memory is read by another thread before the sequence may
        start: restoring it would make them wait for the disk."""
        self.scheduler.add(sequence)
        self.compiler.begin(sequence)
        if self.scheduler.running and (state := self.scheduler.restores(sequence)):
            self.reader.begin(sequence, state)

    def step(self) -> list[RequestEvent]:
        """Advances every running sequence, and returns what happened, in order."""
        self.reader.finish()
        for sequence, fault in self.compiler.finish():
            if self.scheduler.find(sequence.request.id) is sequence:
                self._fail(sequence, fault, "grammar")
        for action in self.scheduler.admit():
            self._act(action)
        for action in self.scheduler.relieve():
            self._act(action)
        self._evaluate(self.scheduler.pooled())
        self._evaluate(self.scheduler.decoding())
        self._evaluate(self.scheduler.prefilling())
        self.events += _drained(self.written)
        events, self.events = self.events, []
        return events

    def _act(self, action: Action) -> None:
        match action:
            case Start():
                self._start(action)
            case Fill(trunk=trunk, tokens=tokens, origin=origin):
                filled = self._load(trunk, origin, len(tokens))
                trunk.hold(tokens if filled else [], len(tokens) if filled else 0, len(tokens))
            case Drop(seat=seat):
                self.model.clear(seat.id)
                seat.hold([], 0, 0)
            case Move(sequence=sequence, slot=slot):
                self._move(sequence, slot)

    def _start(self, start: Start) -> None:
        sequence, slot, keep = start.sequence, start.slot, start.keep
        sequence.placed = monotonic()
        exact = min(slot.exact, keep) if start.origin is None else keep
        if keep and self._load(slot, start.origin, keep):
            slot.hold(sequence.tokens[:keep], exact, sequence.request.boundary)
            sequence.source = "file" if isinstance(start.origin, StateRef) else "slot"
        else:
            self.model.clear(slot.id)
            slot.hold([], 0, sequence.request.boundary)
        sequence.computed = sequence.cached = len(slot.tokens)
        sequence.restored = monotonic()

    def _load(self, slot: Slot, origin: StateRef | Slot | None, keep: int) -> bool:
        """Whether the slot now holds the first `keep` tokens of `origin`, or of what it held before."""
        if origin is None:
            return self.model.cut(slot.id, keep)
        self.model.clear(slot.id)
        if isinstance(origin, Slot):
            return self.model.copy(origin.id, slot.id, keep)
        return self._restore(slot.id, origin, keep)

    def _move(self, sequence: Sequence, slot: Slot) -> None:
        seat = sequence.slot
        assert seat is not None
        if not self._load(slot, seat, len(seat.tokens)):
            self._fail(sequence, "the sequence could not be moved out of the pool")
            slot.hold([], 0, 0)
            return
        slot.hold(seat.tokens, seat.exact, seat.boundary)
        self.scheduler.moved(sequence, slot)
        self._act(Drop(seat))

    def _restore(self, seq: int, state: StateRef, keep: int) -> bool:
        """Whether the cleared sequence now holds the state's first `keep` tokens; a file that is gone or
        changed is no error, only a miss."""
        try:
            with state_file.mapped(state) as mapping, memoryview(mapping) as view:
                restored = self.model.restore(seq, view, state.offset, state.offset + state.nbytes)
                return restored and (keep == state.n_tokens or self.model.cut(seq, keep))
        except OSError as error:
            log.warning("state not restored from %s: %s", state.path, error)
            return False

    def _evaluate(self, work: Work) -> None:
        if not work:
            return
        try:
            self.model.evaluate([piece for _, piece in work])
        except ModelError as error:
            for sequence, _ in work:
                self._fail(sequence, str(error))
            return
        self.scheduler.served(work)
        for row, (sequence, piece) in enumerate(work):
            self._advance(sequence, len(piece.tokens))
            if sequence.computed == sequence.request.boundary and not self._settle(sequence):
                continue
            if piece.sample:
                self._sample(sequence, row)
            elif not sequence.is_prefilling:
                self._complete(sequence)

    def _advance(self, sequence: Sequence, n_tokens: int) -> None:
        slot = sequence.slot
        assert slot is not None
        if sequence.is_prefilling:
            sequence.evaluated += n_tokens
            if slot.exact == sequence.computed and not slot.pooled:
                slot.exact += n_tokens
        slot.tokens += sequence.tokens[sequence.computed : sequence.computed + n_tokens]
        sequence.computed += n_tokens
        if sequence.request.save_to:
            self.events.append(Progress(sequence.request.id, sequence.computed, sequence.n_prompt))

    def _settle(self, sequence: Sequence) -> bool:
        """At the boundary, a state that can only be used whole is made to lie where it would after a restore:
        the last cells of a window may lie elsewhere when computed. False: the sequence has failed."""
        assert sequence.slot is not None
        try:
            if not self.model.info.can_cut:
                self.model.settle(sequence.slot.id)
        except ModelError as error:
            self._fail(sequence, str(error))
            return False
        return True

    def _sample(self, sequence: Sequence, row: int) -> None:
        try:
            if sequence.sampler is None:
                request = sequence.request
                sequence.sampler = self.model.sampler(request.sampling, request.tokens, sequence.matcher)
            token = self.model.sample(row, sequence.sampler)
        except GrammarError as error:
            self._fail(sequence, str(error), "grammar")
            return
        sequence.first_token = sequence.first_token or monotonic()
        if self.model.is_end(token):
            self._finish(sequence, "stop")
            return
        sequence.tokens.append(token)
        self.events.append(Token(sequence.request.id, token))
        if sequence.sampler.ended:
            self._finish(sequence, "stop")
            return
        full = len(sequence.tokens) >= self.model.info.n_ctx
        if full or sequence.n_generated == sequence.request.max_tokens:
            self._finish(sequence, "length")

    def _complete(self, sequence: Sequence) -> None:
        """A sequence that generates nothing has its prompt computed: save it, if so asked."""
        sequence.first_token = monotonic()
        place = sequence.request.save_to
        if place is None:
            self._finish(sequence, "length")
            return
        assert sequence.slot is not None
        try:
            state = self.model.save(sequence.slot.id)
        except ModelError as error:
            self._fail(sequence, str(error))
            return
        self._release(sequence)
        self.writer.submit(self._write, sequence, place, state)

    def _write(self, sequence: Sequence, place: SaveTo, state: memoryview) -> None:
        """Runs on the writer thread."""
        try:
            saved = state_file.write(place, state)
        except OSError as error:
            kind: FailureKind = "storage_full" if error.errno in state_file.NO_ROOM else "storage"
            self.written.put(Failed(sequence.request.id, kind, f"state not written: {error.strerror}"))
        else:
            stats = self._stats(sequence, len(state), saved)
            self.written.put(Finished(sequence.request.id, "saved", stats))
        self.wake()

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.events.append(Finished(sequence.request.id, reason, self._stats(sequence)))
        self._release(sequence)

    def _fail(self, sequence: Sequence, message: str, kind: FailureKind = "engine") -> None:
        self.events.append(Failed(sequence.request.id, kind, message))
        slot = sequence.slot
        self._release(sequence)
        if slot:
            self.model.clear(slot.id)
            slot.hold([], 0, 0)

    def _release(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        if sequence.sampler:
            sequence.sampler.close()

    def _stats(self, sequence: Sequence, saved_bytes: int = 0, saved_blake3: str = "") -> Stats:
        now = monotonic()
        placed = sequence.placed or now
        restored = sequence.restored or placed
        first = sequence.first_token or now
        restore = sequence.request.restore
        return Stats(
            prompt_tokens=sequence.n_prompt,
            cached_tokens=sequence.cached,
            evaluated_tokens=sequence.evaluated,
            generated_tokens=sequence.n_generated,
            source=sequence.source,
            restored_bytes=restore.nbytes if restore and sequence.source == "file" else 0,
            saved_bytes=saved_bytes,
            saved_blake3=saved_blake3,
            queue_ms=1000 * (placed - sequence.arrived),
            restore_ms=1000 * (restored - placed),
            prefill_ms=1000 * (first - restored),
            decode_ms=1000 * (now - first),
            ttft_ms=1000 * (first - sequence.arrived),
        )


def _drained(queue: SimpleQueue[RequestEvent]) -> Iterator[RequestEvent]:
    """What is in the queue now."""
    try:
        while True:
            yield queue.get_nowait()
    except Empty:
        return
