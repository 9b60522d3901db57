"""Runs prepared requests through the engine; yields their answers and results with the engine's figures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from time import monotonic

from headstart.caches.entry import KEEPS_STATE, Form, MissReason
from headstart.errors import HeadstartError
from headstart.prompt.detokenizer import AnswerDetokenizer
from headstart.protocol import Finished, Progress, Stats, Token
from headstart.service.caching.caching import Caching
from headstart.service.generation import embeddings
from headstart.service.generation.answering import Answering
from headstart.service.generation.explain import explained
from headstart.service.generation.prepare import Preparation, Prepared
from headstart.service.interface.answer import AnswerEvent, Explanation, PromptProgress, Result
from headstart.service.interface.observer import ABANDONED, Answered, Failure, Observer, Restored, Submitted
from headstart.service.models.tenant_model import TenantModel
from headstart.service.origins.automatic import Automatic
from headstart.service.origins.breakpoints import Breakpoints
from headstart.service.origins.conversations import Conversations, SaveRequest
from headstart.service.origins.responses import Responses, n_tokens


class Generation:
    """`chat`, `texts` and `count` are those of Preparation."""

    def __init__(
        self,
        preparation: Preparation,
        caching: Caching,
        automatic: Automatic,
        conversations: Conversations,
        responses: Responses,
        breakpoints: Breakpoints,
        observer: Observer,
    ) -> None:
        self.chat = preparation.chat
        self.texts = preparation.texts
        self.count = preparation.count
        self.caching = caching
        self.automatic = automatic
        self.conversations = conversations
        self.responses = responses
        self.breakpoints = breakpoints
        self.observer = observer

    async def run(self, prepared: Prepared) -> AsyncGenerator[AnswerEvent, None]:
        """Yields PromptProgress if the options ask for it, the answers' deltas, an Ended for each answer, and
        finally one Result, immediately after the last Ended. Closing it early ends the sequences. When the
        item after the Result is requested, the response is stored, if it is to be."""
        answers = [_answering(prepared, choice) for choice in range(prepared.submit.n)]
        stats: Stats | None = None
        result: Result | None = None
        self.observer.submitted(_submitted(prepared))
        try:
            with prepared.model.engine.submit(prepared.submit) as running:
                async for event in running:
                    answer = answers[event.id - running.id]
                    match event:
                        case Token() if not answer.stopped:
                            if not any(each.n_tokens for each in answers):
                                self._rebuild_after_miss(prepared, prepared.start.miss)
                            for delta in answer.add(event):
                                yield delta
                            if answer.stopped:
                                running.cancel(answer.choice)
                        case Progress():
                            yield _progress(answer, event)
                        case Finished(reason=reason):
                            # The prompt was prefilled for the first answer.
                            if answer.choice == 0:
                                stats = event.stats
                            left = list(answer.end(reason))
                            if stats and all(each.ended for each in answers):
                                result = await self._result(prepared, answers, stats)
                            for last in left:
                                yield last
            assert result
            yield result
            self._keep_response(prepared, answers[0])
        except (HeadstartError, *ABANDONED) as error:
            if result is None:
                self.observer.failed(
                    Failure("answer", prepared.model.name, error, owner=prepared.model.owner)
                )
            raise

    def embed(self, model: TenantModel, inputs: list[list[int]]) -> AsyncGenerator[bytes, None]:
        """As `embeddings.embed`."""
        return embeddings.embed(model, inputs, self.observer)

    async def _result(self, prepared: Prepared, answers: Sequence[Answering], stats: Stats) -> Result:
        miss = _miss(prepared, stats)
        n_generated = sum(answer.n_tokens for answer in answers)
        if n_generated == 0 or prepared.start.miss is None:
            self._rebuild_after_miss(prepared, miss)
        self._count_uses(prepared, miss, stats)
        n_reasoning = 0
        if prepared.options.count_reasoning:
            n_reasoning = await n_tokens(prepared.model, answers[0].whole.reasoning)
        result = Result(
            n_tokens=n_generated,
            stats=stats,
            cache_hit=None if prepared.plan.entry is None else miss is None,
            cache_names=prepared.names,
            miss=miss,
            matched=max(prepared.matched, stats.cached_tokens),
            explanation=_explained(prepared, miss, stats),
            saved_as=self._saved_as(prepared, answers[0]),
            warning=prepared.warning,
            n_reasoning=n_reasoning,
        )
        if stats.restored_bytes:
            self.observer.restored(Restored(prepared.model.name, stats))
        self.observer.answered(_answered(prepared, result, answers))
        return result

    def _count_uses(self, prepared: Prepared, miss: MissReason | None, stats: Stats) -> None:
        plan = prepared.plan
        # Writes to the disk wait until the answer's end has been sent.
        later = asyncio.get_running_loop().call_soon
        if plan.match:
            later(self.automatic.answered, prepared.model, plan.match, stats)
        if plan.breakpoints:
            later(self.breakpoints.answered, prepared.model, plan.breakpoints)
        if plan.entry and miss is None:
            later(self.caching.count_hit, plan.entry, prepared.start.boundary, stats)

    def _saved_as(self, prepared: Prepared, answer: Answering) -> str | None:
        """Starts saving the chat as a conversation, if it is to be; returns the cache's name."""
        keep, plan = prepared.options.keep, prepared.plan
        if keep is None or keep.body or plan.chat is None:
            return None
        saving = SaveRequest(prepared.model, keep.name, keep.overwrite, plan.chat, plan.base)
        self.conversations.save(saving, answer.raw_text)
        return keep.name

    def _keep_response(self, prepared: Prepared, answer: Answering) -> None:
        keep, plan = prepared.options.keep, prepared.plan
        if keep is None or keep.body is None or plan.chat is None:
            return
        if keep.caches is None:
            n_cached = len(plan.entry.content.prefix_messages) if plan.entry else 0
            keep = replace(keep, caches=prepared.names, n_cached=n_cached)
        self.responses.keep(prepared.model, keep, plan.chat, plan.base, answer.whole)

    def _rebuild_after_miss(self, prepared: Prepared, miss: MissReason | None) -> None:
        """Rebuilds a state that could not be used; called once the request itself has its first token."""
        entry = prepared.plan.entry
        if entry and miss and miss not in KEEPS_STATE:
            self.caching.rebuild_after_miss(prepared.model, entry)


def _submitted(prepared: Prepared) -> Submitted:
    model = prepared.model
    form: Form = "chat" if prepared.plan.chat else "completion"
    return Submitted(model.name, model.owner, form, prepared.options)


def _answering(prepared: Prepared, choice: int) -> Answering:
    """Only what is stored or counted afterwards is summed up: deltas of others may be many."""
    options = prepared.options
    text = AnswerDetokenizer(prepared.piece, options.stop)
    sums_up = options.keep is not None or options.count_reasoning
    return Answering(choice, prepared.model.vocabulary, text, prepared.parser(), sums_up=sums_up)


def _answered(prepared: Prepared, result: Result, answers: Sequence[Answering]) -> Answered:
    now = monotonic()
    return Answered(
        prepared.model.name,
        prepared.model.owner,
        result,
        [answer.finish_reason for answer in answers],
        now - prepared.received,
        min((answer.times[0] for answer in answers if answer.times), default=now) - prepared.received,
        [gap for answer in answers for gap in answer.gaps],
    )


def _progress(answer: Answering, event: Progress) -> PromptProgress:
    return PromptProgress(answer.choice, event.total, event.cached, event.computed, event.ms)


def _miss(prepared: Prepared, stats: Stats) -> MissReason | None:
    """Why the named state was not used, according to the engine's figures; None if it was, or no cache was
    named."""
    if prepared.plan.entry is None:
        return None
    if prepared.start.miss:
        return prepared.start.miss
    if not prepared.model.info.counts_reuse:
        return "not_counted"
    return None if stats.cached_tokens >= prepared.start.needed else "restore_failed"


def _explained(prepared: Prepared, miss: MissReason | None, stats: Stats) -> Explanation | None:
    if not prepared.options.explain:
        return None
    named = prepared.plan.entry is not None
    written, tokens = prepared.model.vocabulary.written, prepared.submit.tokens
    return explained(prepared.closest, tokens, written, named=named, miss=miss, stats=stats)
