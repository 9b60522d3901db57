"""The engine: one step starts waiting sequences, evaluates a batch, samples, and reports the events."""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING

from headstart.engine.core import state_file
from headstart.engine.core.actions import Action, Drop, Fill, Move, StartSequence
from headstart.engine.core.chunking import Chunking
from headstart.engine.core.embeddings import Embeddings
from headstart.engine.core.grammar_compiler import Compiler
from headstart.engine.core.scheduler import Scheduler, Work
from headstart.engine.core.sequence import Sequence, Slot
from headstart.engine.core.state_io import Reader, Writer
from headstart.engine.core.stats import progress_event, stats, token_event
from headstart.engine.grammar import GrammarError
from headstart.engine.model import Model, ModelError
from headstart.engine.worker_engine import Wake
from headstart.protocol import (
    Cancel,
    Command,
    Embed,
    Failed,
    FailureKind,
    Finished,
    Forget,
    Forgotten,
    ModelInfo,
    RequestEvent,
    SequenceEnd,
    StateRef,
    Submit,
)

if TYPE_CHECKING:
    from headstart.engine.logprobs import Logprobs

log = logging.getLogger(__name__)


class CoreEngine:
    """Runs sequences on a model. Every submitted request ends in exactly one Finished or Failed event.

    Other threads wait for disks. They call `wake` when a step has something new to do: a state was written,
    or a sequence's state is in memory or its grammar compiled.
    """

    def __init__(self, model: Model, chunking: Chunking, wake: Wake, *, share_from: int = 0) -> None:
        self.model = model
        self.scheduler = Scheduler(
            model.info.slots,
            chunking,
            step_tokens=model.info.step_tokens,
            can_cut=model.info.can_cut,
            pool_cells=model.info.pool_tokens,
            share_from=share_from,
        )
        self.embeddings = Embeddings(model, chunking)
        self.events: list[RequestEvent] = []
        self.wake = wake
        self.writer = Writer(wake)
        self.reader = Reader(wake)
        self.compiler = Compiler(model.grammars, wake)

    @property
    def info(self) -> ModelInfo:
        return self.model.info

    @property
    def busy(self) -> bool:
        return self.scheduler.busy or self.embeddings.busy

    def handle(self, command: Command) -> None:
        match command:
            case Submit():
                self._add(Sequence(command, list(command.tokens), monotonic()))
            case Embed():
                self.embeddings.add(command)
            case Cancel(id=request_id):
                self.events += self.embeddings.cancel(request_id)
                if sequence := self.scheduler.find(request_id):
                    self._finish(sequence, "cancelled")
            case Forget(id=request_id):
                self.events.append(Forgotten(request_id, 0))

    def _add(self, sequence: Sequence) -> None:
        """If others run, another thread reads a state that isn't in memory before the sequence may start:
        restoring it would make them wait for the disk."""
        self.scheduler.add(sequence)
        self.compiler.begin(sequence)
        if self.scheduler.running and (state := self.scheduler.restores(sequence)):
            self.reader.begin(sequence, state)

    def step(self) -> list[RequestEvent]:
        """Advances every running sequence, and returns the events in order."""
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
        self.events += self.embeddings.step()
        self.events += self.writer.finished()
        if log.isEnabledFor(logging.DEBUG):
            self.scheduler.check_integrity()
        events, self.events = self.events, []
        return events

    def _act(self, action: Action) -> None:
        match action:
            case StartSequence():
                self._start(action)
            case Fill(prefix_slot=prefix_slot, tokens=tokens, origin=origin):
                self._fill(prefix_slot, tokens, origin)
            case Drop(slot=slot):
                self.model.clear(slot.id)
                slot.hold([], 0, 0)
            case Move():
                self._move(action)

    def _start(self, start: StartSequence) -> None:
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
        if sequence.request.progress:
            self.events.append(progress_event(sequence))

    def _load(self, slot: Slot, origin: StateRef | Slot | None, keep: int) -> bool:
        """Loads the first `keep` tokens of `origin`, or of the slot's own state; False if that failed."""
        if origin is None:
            return self.model.cut(slot.id, keep)
        self.model.clear(slot.id)
        if isinstance(origin, Slot):
            return self.model.copy(origin.id, slot.id, keep)
        return self._restore(slot.id, origin, keep)

    def _fill(self, prefix_slot: Slot, tokens: list[int], origin: StateRef | Slot) -> None:
        if not self._load(prefix_slot, origin, len(tokens)):
            prefix_slot.hold([], 0, 0)
        elif isinstance(origin, Slot):
            prefix_slot.hold(tokens, min(origin.exact, len(tokens)), origin.boundary)
        else:
            prefix_slot.hold(tokens, len(tokens), len(tokens))

    def _move(self, move: Move) -> None:
        sequence, slot, origin = move.sequence, move.slot, move.origin
        left = sequence.slot
        if not self._load(slot, origin, len(origin.tokens)):
            self._fail(sequence, "the sequence could not be moved to another slot")
            slot.hold([], 0, 0)
            return
        slot.hold(origin.tokens.copy(), origin.exact, origin.boundary)
        self.scheduler.moved(sequence, slot)
        if left and left.pooled:
            self._act(Drop(left))

    def _restore(self, seq: int, state: StateRef, keep: int) -> bool:
        """Fills the cleared sequence with the state's first `keep` tokens; False if that failed. A file that
        is gone or changed is no error, only a miss."""
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
            if sequence.computed == sequence.request.boundary and not self._relocate(sequence):
                continue
            if piece.sample:
                self._sample(sequence, row)
            elif not sequence.is_prefilling:
                self._complete(sequence)

    def _advance(self, sequence: Sequence, n_tokens: int) -> None:
        slot = sequence.slot
        assert slot is not None
        prefilled = sequence.is_prefilling
        if prefilled:
            sequence.evaluated += n_tokens
            if slot.exact == sequence.computed and not slot.pooled:
                slot.exact += n_tokens
        slot.tokens += sequence.tokens[sequence.computed : sequence.computed + n_tokens]
        sequence.computed += n_tokens
        if prefilled and (sequence.request.progress or sequence.request.save_to):
            self.events.append(progress_event(sequence))

    def _relocate(self, sequence: Sequence) -> bool:
        """At the boundary, moves a state that can only be used whole to where a restore would place it:
        computed cells of a window may lie elsewhere. False: the sequence has failed."""
        assert sequence.slot is not None
        try:
            if not self.model.info.can_cut:
                self.model.relocate(sequence.slot.id)
        except ModelError as error:
            self._fail(sequence, str(error))
            return False
        return True

    def _sample(self, sequence: Sequence, row: int) -> None:
        """Chooses the sequence's next token, and the first tokens of all other answers to its prompt."""
        n_logprobs = sequence.request.sampling.logprobs
        logprobs = None if n_logprobs is None else self.model.logprobs(row)
        siblings = sequence.divide()
        try:
            chosen = [(each, self._choose(each, row)) for each in (sequence, *siblings)]
        except GrammarError as error:
            for each in (sequence, *siblings):
                self._fail(each, str(error), "grammar")
            return
        for action in self.scheduler.place(siblings, sequence):
            self._act(action)
        for each, token in chosen:
            if each in self.scheduler.running:
                self._accept(each, token, logprobs)
            elif each.slot is None:
                self._fail(each, "the prompt's state could not be copied")

    def _choose(self, sequence: Sequence, row: int) -> int:
        if sequence.sampler is None:
            request = sequence.request
            sequence.sampler = self.model.sampler(request.sampling, request.tokens, sequence.matcher)
        return self.model.sample(row, sequence.sampler)

    def _accept(self, sequence: Sequence, token: int, logprobs: Logprobs | None) -> None:
        sequence.first_token = sequence.first_token or monotonic()
        if self.model.is_end(token):
            self._finish(sequence, "stop")
            return
        sequence.tokens.append(token)
        self.events.append(token_event(sequence, token, logprobs))
        if sequence.sampler and sequence.sampler.ended:
            self._finish(sequence, "stop")
            return
        full = len(sequence.tokens) >= self.model.info.n_ctx
        if full or sequence.n_generated == sequence.request.max_tokens:
            self._finish(sequence, "length")

    def _complete(self, sequence: Sequence) -> None:
        """Ends a sequence that generates nothing and has its prompt computed; saves its state if
        requested."""
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
        self.writer.begin(sequence, place, state)

    def _finish(self, sequence: Sequence, reason: SequenceEnd) -> None:
        account = stats(sequence)
        self.events += [Finished(answer, reason, account) for answer in sequence.ids]
        self._release(sequence)

    def _fail(self, sequence: Sequence, message: str, kind: FailureKind = "engine") -> None:
        self.events += [Failed(answer, kind, message) for answer in sequence.ids]
        slot = sequence.slot
        self._release(sequence)
        if slot:
            self.model.clear(slot.id)
            slot.hold([], 0, 0)

    def _release(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        if sequence.sampler:
            sequence.sampler.close()
