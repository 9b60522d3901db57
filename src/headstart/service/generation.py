"""One answer: a prepared request through the engine, to text and a true account of it all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal

from headstart.caches.entry import KEEPS_STATE, MissReason
from headstart.messages import Finished, Stats, Token
from headstart.prompt.answer import AnswerText
from headstart.service.automatic import Automatic
from headstart.service.caching import Caching
from headstart.service.conversations import Conversations
from headstart.service.explanation import Explanation, explained
from headstart.service.preparation import Prepared


@dataclass(frozen=True)
class Text:
    """A piece of the answer, never empty."""

    text: str


@dataclass(frozen=True)
class Result:
    """The end of an answer of `n_tokens` tokens. `cache_hit` is None when no cache was named, else whether
    the engine started from its state; all counts are the engine's. `matched`: how many of the prompt's tokens
    the closest known state begins with. `explanation`: only where it was asked for. `saved_as`: the name
    under which the chat is being kept. `warning`: how it was answered otherwise than asked."""

    finish_reason: Literal["stop", "length"]
    n_tokens: int
    stats: Stats
    cache_hit: bool | None = None
    cache_names: Sequence[str] = ()
    miss: MissReason | None = None
    matched: int = 0
    explanation: Explanation | None = None
    saved_as: str | None = None
    warning: str = ""


class Generation:
    def __init__(self, caching: Caching, automatic: Automatic, conversations: Conversations) -> None:
        self.caching = caching
        self.automatic = automatic
        self.conversations = conversations

    async def run(self, prepared: Prepared) -> AsyncGenerator[Text | Result, None]:
        """Yields the answer's text and, last, one Result. Closing it early ends the sequence."""
        answer = AnswerText(prepared.model.prompts.tokenizer.piece, prepared.stop)
        said = ""
        n_tokens = 0
        with prepared.model.engine.submit(prepared.submit) as running:
            async for event in running:
                match event:
                    case Token(token=token) if not answer.stopped:
                        if n_tokens == 0:
                            self._heal(prepared, prepared.opening.miss)
                        n_tokens += 1
                        if text := answer.add(token):
                            said += text
                            yield Text(text)
                        if answer.stopped:
                            running.cancel()
                    case Finished(reason=reason, stats=stats):
                        if text := answer.end():
                            said += text
                            yield Text(text)
                        miss = _miss(prepared, stats)
                        if n_tokens == 0 or prepared.opening.miss is None:
                            self._heal(prepared, miss)
                        if prepared.unnamed:
                            tell = self.automatic.answered
                            asyncio.get_running_loop().call_soon(
                                tell, prepared.model, prepared.unnamed, stats
                            )
                        if prepared.entry and miss is None:
                            # A write to the disk: after the answer's end has been sent.
                            asyncio.get_running_loop().call_soon(
                                self.caching.count_hit, prepared.entry, prepared.opening.boundary, stats
                            )
                        if prepared.saving:
                            self.conversations.save(prepared.saving, said)
                        yield Result(
                            finish_reason="length" if reason == "length" and not answer.stopped else "stop",
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
        """Has a state that could not be used computed again, once the request itself has its first token."""
        if prepared.entry and miss and miss not in KEEPS_STATE:
            self.caching.rebuild(prepared.model, prepared.entry)


def _miss(prepared: Prepared, stats: Stats) -> MissReason | None:
    """Why the named state was not used, by what the engine says it started from; None without a name."""
    if prepared.entry is None:
        return None
    if prepared.opening.miss:
        return prepared.opening.miss
    info, boundary = prepared.model.info, prepared.opening.boundary
    if not info.counts_reuse:
        return "not_counted"
    # Where the runtime cuts what it reuses is its own affair, but most of the cache must have been.
    needed = (boundary + 1) // 2 if info.state_files else boundary
    return None if stats.cached_tokens >= needed else "restore_failed"


def _explained(prepared: Prepared, miss: MissReason | None, stats: Stats) -> Explanation | None:
    if not prepared.explain:
        return None
    named = prepared.entry is not None
    return explained(prepared.closest, prepared.submit.tokens, named=named, miss=miss, stats=stats)
