"""The engine: one step starts waiting sequences, evaluates a batch, samples, and reports the events."""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING

from headstart.engine.core.actions import Action, Drop, Fill, Move, Park, Read, StartSequence
from headstart.engine.core.chunking import Chunking
from headstart.engine.core.embeddings import Embeddings
from headstart.engine.core.grammar_compiler import Compiler
from headstart.engine.core.scheduler import Scheduler, Work
from headstart.engine.core.sequence import Sequence
from headstart.engine.core.slot_states import SlotStates
from headstart.engine.core.state_io import Reader, Writer
from headstart.engine.core.stats import progress_event, stats, token_event
from headstart.engine.grammar import GrammarError
from headstart.engine.model import Model, ModelError
from headstart.engine.states.store import StateStore
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
    SetStateLimits,
    StoreReport,
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

    def __init__(
        self,
        model: Model,
        chunking: Chunking,
        wake: Wake,
        *,
        share_from: int = 0,
        store: StateStore | None = None,
    ) -> None:
        self.model = model
        self.store = store
        self.scheduler = Scheduler(
            model.info.slots,
            chunking,
            step_tokens=model.info.step_tokens,
            can_cut=model.info.can_cut,
            pool_cells=model.info.pool_tokens,
            share_from=share_from,
            store=store,
        )
        self.states = SlotStates(model, self.scheduler, store)
        self.embeddings = Embeddings(model, chunking)
        self.events: list[RequestEvent] = []
        self.wake = wake
        self.writer = Writer(wake)
        self.reader = Reader(wake)
        self.compiler = Compiler(model.grammars, wake)
        self.idle_since = monotonic()

    @property
    def info(self) -> ModelInfo:
        return self.model.info

    @property
    def busy(self) -> bool:
        return self.scheduler.busy or self.embeddings.busy

    @property
    def pause(self) -> float | None:
        if self.busy or self.scheduler.waiting:
            return None
        return self.states.pause(self.idle_since)

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
            case SetStateLimits(memory_bytes=memory, disk_bytes=disk) if self.store:
                self.store.set_limits(memory, disk)
            case Forget():
                self.events.append(Forgotten(command.id, self.states.forget(command)))

    def _add(self, sequence: Sequence) -> None:
        """If others run, another thread reads a state that isn't in memory before the sequence may start:
        restoring it would make them wait for the disk."""
        self.scheduler.add(sequence)
        self.compiler.begin(sequence)
        if self.scheduler.running and (state := self.scheduler.restores(sequence)):
            self.reader.begin(sequence, state)

    def step(self) -> list[RequestEvent]:
        """Advances every running sequence, and returns the events in order."""
        if self.busy or self.scheduler.waiting:
            self.idle_since = monotonic()
        else:
            self.states.tidy(self.idle_since)
        self.reader.finish()
        self.states.finish_transfers()
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

    def report(self) -> StoreReport | None:
        return self.states.report(busy=self.busy)

    def flush(self, seconds: float) -> None:
        self.states.flush(seconds)

    def _act(self, action: Action) -> None:
        match action:
            case StartSequence(sequence=sequence):
                self.states.start(action)
                if sequence.request.progress:
                    self.events.append(progress_event(sequence))
            case Fill():
                self.states.fill(action)
            case Drop(slot=slot):
                self.states.drop(slot)
            case Park(slot=slot):
                self.states.park(slot)
            case Read():
                self.states.read(action)
            case Move(sequence=sequence, slot=slot):
                self._move(action)

    def _move(self, move: Move) -> None:
        sequence, left = move.sequence, move.sequence.slot
        if not self.states.move(move):
            self._fail(sequence, "the sequence could not be moved to another slot")
            return
        self.scheduler.moved(sequence, move.slot)
        if left and left.pooled:
            self.states.clear(left)

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
            if sequence.checkpoints and not self._checkpoint(sequence):
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
                slot.cuts.append(slot.exact)
        slot.tokens += sequence.tokens[sequence.computed : sequence.computed + n_tokens]
        sequence.computed += n_tokens
        if prefilled and (sequence.request.progress or sequence.request.save_to):
            self.events.append(progress_event(sequence))

    def _checkpoint(self, sequence: Sequence) -> bool:
        """False: the sequence has failed."""
        try:
            self.states.checkpoint(sequence)
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
            self.states.clear(slot)

    def _release(self, sequence: Sequence) -> None:
        slot = sequence.slot
        self.scheduler.remove(sequence)
        self.states.release(sequence)
        if slot and slot.is_forgotten:
            self.states.clear(slot)
        if sequence.sampler:
            sequence.sampler.close()
