"""One answer: from a request to tokens, through the engine, to text and a true account of it all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Literal

import msgspec

from headstart.caches.entry import KEEPS_STATE, Entry, Form, MissReason
from headstart.errors import BadRequest
from headstart.messages import Finished, Sampling, Stats, Submit, Token
from headstart.prompt.answer import AnswerText
from headstart.prompt.prompts import soon
from headstart.prompt.template import Message
from headstart.service.automatic import Automatic, Unnamed
from headstart.service.caching import Caching, Opening
from headstart.service.model import ServedModel
from headstart.tokens import common_prefix


@dataclass(frozen=True)
class Options:
    """What a request says besides its prompt. `max_tokens` None: to the end of the context. `reuse` False:
    every prompt token is evaluated, nothing is taken from a cache or an earlier request."""

    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    use_cache: str | None = None
    reuse: bool = True


@dataclass(frozen=True)
class Text:
    """A piece of the answer, never empty."""

    text: str


@dataclass(frozen=True)
class Result:
    """The end of an answer of `n_tokens` tokens. `cache_hit` is None when no cache was named, else whether
    the engine started from its state; all counts are the engine's."""

    finish_reason: Literal["stop", "length"]
    n_tokens: int
    stats: Stats
    cache_hit: bool | None = None
    cache_name: str | None = None
    miss: MissReason | None = None


@dataclass(frozen=True)
class Prepared:
    """A request ready for the engine. `unnamed`: what it begins with, where it is a chat without a name."""

    model: ServedModel
    submit: Submit
    stop: Sequence[str]
    entry: Entry | None = None
    opening: Opening = field(default_factory=lambda: Opening(0))
    unnamed: Unnamed | None = None


class Generation:
    def __init__(self, caching: Caching, automatic: Automatic) -> None:
        self.caching = caching
        self.automatic = automatic

    async def prepare_chat(
        self, model: ServedModel, messages: Sequence[Message], options: Options
    ) -> Prepared:
        """Raises BadRequest, CacheNotFound, ContextLengthExceeded or Unavailable."""
        prompts = model.prompts
        if options.use_cache is None:
            messages = self.automatic.with_default(messages)
            tokens = await soon(lambda most: prompts.chat(messages, most))
            system = _leading_system(messages)
            prepared = await self._without_cache(
                model, tokens, options, lambda most: prompts.chat_opening(system, most), "messages"
            )
            return await self._unnamed(prepared, system)
        return await self._with_cache(
            model,
            options,
            "chat",
            lambda cached, most: prompts.chat(_after_cached(cached, messages), most),
            "messages",
        )

    async def prepare_text(self, model: ServedModel, prompt: str, options: Options) -> Prepared:
        """Raises as `prepare_chat` does."""
        prompts = model.prompts
        if options.use_cache is None:
            tokens = await soon(lambda most: prompts.text(prompt, most))
            known = self.caching.known_opening(model, prompt)
            return await self._without_cache(
                model, tokens, options, lambda most: prompts.text_opening(known, most), "prompt"
            )
        return await self._with_cache(
            model, options, "completion", lambda cached, most: prompts.text(cached + prompt, most), "prompt"
        )

    async def _with_cache(
        self,
        model: ServedModel,
        options: Options,
        form: Form,
        encode: Callable[[str, int], list[int]],
        param: str,
    ) -> Prepared:
        """`encode` gives the request's tokens after a cached prompt, as `soon` wants it."""
        assert options.use_cache is not None
        opening = None
        while opening is None:
            entry = await self.caching.find(model, options.use_cache)
            tokens = await soon(partial(encode, entry.prompt))
            opening = await self.caching.open(model, entry, form, tokens)
        return self._prepared(model, tokens, options, entry, opening, param)

    async def _without_cache(
        self,
        model: ServedModel,
        tokens: list[int],
        options: Options,
        find_opening: Callable[[int], list[int]],
        param: str,
    ) -> Prepared:
        """Cuts the prefill where a cache of the same opening would end, so that the answer is the same."""
        model.check_fits(len(tokens), param=param)
        wanted = await soon(find_opening)
        boundary = max(min(common_prefix(wanted, tokens), len(tokens) - 1), 0)
        return self._prepared(model, tokens, options, None, Opening(boundary), param)

    async def _unnamed(self, prepared: Prepared, system: Sequence[Message]) -> Prepared:
        """Lets the request start from a cache with the same opening, though it names none."""
        submit = prepared.submit
        if not submit.reuse:
            return prepared
        unnamed = await self.automatic.look(prepared.model, system, submit.tokens, submit.boundary)
        if unnamed and unnamed.restore:
            public = _public(submit.boundary, unnamed.entry)
            submit = msgspec.structs.replace(submit, restore=unnamed.restore, public=public)
        return replace(prepared, submit=submit, unnamed=unnamed)

    def _prepared(
        self,
        model: ServedModel,
        tokens: list[int],
        options: Options,
        entry: Entry | None,
        opening: Opening,
        param: str,
    ) -> Prepared:
        if not tokens:
            raise BadRequest("The prompt is empty.", param=param)
        model.check_fits(len(tokens), param=param)
        room = model.info.n_ctx - len(tokens)
        submit = Submit(
            id=0,
            tokens=tokens,
            boundary=opening.boundary,
            max_tokens=room if options.max_tokens is None else min(options.max_tokens, room),
            sampling=options.sampling,
            restore=opening.restore,
            reuse=options.reuse,
            owner=model.owner,
            public=_public(opening.boundary, entry),
        )
        if not options.reuse:
            opening = Opening(opening.boundary, miss="cache_prompt_false")
        return Prepared(model, submit, options.stop, entry, opening)

    async def run(self, prepared: Prepared) -> AsyncGenerator[Text | Result, None]:
        """Yields the answer's text and, last, one Result. Closing it early ends the sequence."""
        answer = AnswerText(prepared.model.prompts.tokenizer.piece, prepared.stop)
        n_tokens = 0
        with prepared.model.engine.submit(prepared.submit) as running:
            async for event in running:
                match event:
                    case Token(token=token) if not answer.stopped:
                        if n_tokens == 0:
                            self._heal(prepared, prepared.opening.miss)
                        n_tokens += 1
                        if text := answer.add(token):
                            yield Text(text)
                        if answer.stopped:
                            running.cancel()
                    case Finished(reason=reason, stats=stats):
                        if text := answer.end():
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
                            asyncio.get_running_loop().call_soon(self.caching.store.used, prepared.entry)
                        yield Result(
                            finish_reason="length" if reason == "length" and not answer.stopped else "stop",
                            n_tokens=n_tokens,
                            stats=stats,
                            cache_hit=None if prepared.entry is None else miss is None,
                            cache_name=prepared.entry.name if prepared.entry else None,
                            miss=miss,
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
    return None if stats.cached_tokens >= prepared.opening.boundary else "restore_failed"


def _public(boundary: int, entry: Entry | None) -> int:
    """How many tokens of a request are no secret: those of a cache that is everyone's."""
    return boundary if entry and not entry.owner else 0


def _leading_system(messages: Sequence[Message]) -> list[Message]:
    return list(takewhile(lambda message: message["role"] == "system", messages))


def _after_cached(prompt: str, messages: Sequence[Message]) -> list[Message]:
    """The cached system message before the request's own; one equal to it is not repeated."""
    cached: Message = {"role": "system", "content": prompt}
    return [cached, *(messages[1:] if messages and messages[0] == cached else messages)]
