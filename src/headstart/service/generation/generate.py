"""Runs a prepared request through the engine; yields its answers and a result with the engine's figures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from headstart.caches.entry import KEEPS_STATE, MissReason
from headstart.prompt.detokenizer import AnswerText
from headstart.protocol import Finished, Stats, Token
from headstart.service.caching.caching import Caching
from headstart.service.generation.answering import Answering
from headstart.service.generation.explain import Explanation, explained
from headstart.service.generation.prepared import Prepared
from headstart.service.interface.answer import Delta, Ended
from headstart.service.origins.automatic import Automatic
from headstart.service.origins.breakpoints import Breakpoints
from headstart.service.origins.conversations import Conversations


@dataclass(frozen=True)
class Result:
    """The result of a request. `n_tokens`: tokens of all answers together. `cache_hit`: None if no cache was
    named, otherwise whether the engine started from its state; all counts are the engine's. `matched`: the
    number of prompt tokens in the closest known state's prefix. `explanation`: only if requested. `saved_as`:
    the name under which the chat is being stored. `warning`: how the answer differs from the request.
    `n_reasoning`: tokens of reasoning, if they are counted."""

    n_tokens: int
    stats: Stats
    cache_hit: bool | None = None
    cache_names: Sequence[str] = ()
    miss: MissReason | None = None
    matched: int = 0
    explanation: Explanation | None = None
    saved_as: str | None = None
    warning: str = ""
    n_reasoning: int = 0


class Generation:
    def __init__(
        self, caching: Caching, automatic: Automatic, conversations: Conversations, marks: Breakpoints
    ) -> None:
        self.caching = caching
        self.automatic = automatic
        self.marks = marks
        self.conversations = conversations

    async def run(self, prepared: Prepared) -> AsyncGenerator[Delta | Ended | Result, None]:
        """Yields the answers' deltas, an Ended for each answer, and finally one Result, immediately after the
        last Ended. Closing it early ends the sequences."""
        answers = [_answering(prepared, choice) for choice in range(prepared.submit.n)]
        stats: Stats | None = None
        result: Result | None = None
        with prepared.model.engine.submit(prepared.submit) as running:
            async for event in running:
                answer = answers[event.id - running.id]
                match event:
                    case Token() if not answer.stopped:
                        if not any(each.n_tokens for each in answers):
                            self._heal(prepared, prepared.opening.miss)
                        for delta in answer.add(event):
                            yield delta
                        if answer.stopped:
                            running.cancel(answer.choice)
                    case Finished(reason=reason):
                        # The prompt was prefilled for the first answer.
                        if answer.choice == 0:
                            stats = event.stats
                        left = list(answer.end(reason))
                        if stats and all(each.ended for each in answers):
                            result = self._result(prepared, answers, stats)
                        for last in left:
                            yield last
        assert result
        yield result

    def _result(self, prepared: Prepared, answers: Sequence[Answering], stats: Stats) -> Result:
        n_tokens = sum(answer.n_tokens for answer in answers)
        miss = _miss(prepared, stats)
        if n_tokens == 0 or prepared.opening.miss is None:
            self._heal(prepared, miss)
        # Writes to the disk wait until the answer's end has been sent.
        later = asyncio.get_running_loop().call_soon
        if prepared.unnamed:
            later(self.automatic.answered, prepared.model, prepared.unnamed, stats)
        if prepared.marked:
            later(self.marks.answered, prepared.model, prepared.marked)
        if prepared.entry and miss is None:
            later(self.caching.count_hit, prepared.entry, prepared.opening.boundary, stats)
        if prepared.saving:
            self.conversations.save(prepared.saving, answers[0].said)
        return Result(
            n_tokens=n_tokens,
            stats=stats,
            cache_hit=None if prepared.entry is None else miss is None,
            cache_names=prepared.names,
            miss=miss,
            matched=max(prepared.matched, stats.cached_tokens),
            explanation=_explained(prepared, miss, stats),
            saved_as=prepared.saving.name if prepared.saving else None,
            warning=prepared.warning,
        )

    def _heal(self, prepared: Prepared, miss: MissReason | None) -> None:
        """Rebuilds a state that could not be used; called once the request itself has its first token."""
        if prepared.entry and miss and miss not in KEEPS_STATE:
            self.caching.rebuild_after_miss(prepared.model, prepared.entry)


def _answering(prepared: Prepared, choice: int) -> Answering:
    vocabulary = prepared.model.vocabulary
    text = AnswerText(prepared.piece or vocabulary.piece, prepared.stop)
    return Answering(choice, vocabulary, text, prepared.parser())


def _miss(prepared: Prepared, stats: Stats) -> MissReason | None:
    """Why the named state was not used, according to the engine's figures; None if it was, or no cache was
    named."""
    if prepared.entry is None:
        return None
    if prepared.opening.miss:
        return prepared.opening.miss
    info, boundary = prepared.model.info, prepared.opening.boundary
    if not info.counts_reuse:
        return "not_counted"
    # The runtime decides how much it reuses, but it must be most of the cache.
    needed = (boundary + 1) // 2 if info.state_files else boundary
    return None if stats.cached_tokens >= needed else "restore_failed"


def _explained(prepared: Prepared, miss: MissReason | None, stats: Stats) -> Explanation | None:
    if not prepared.explain:
        return None
    named = prepared.entry is not None
    return explained(prepared.closest, prepared.submit.tokens, named=named, miss=miss, stats=stats)
