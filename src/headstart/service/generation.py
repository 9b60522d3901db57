"""One answer: from a request to tokens, through the engine, to text and a true account of it all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from headstart.caches.entry import KEEPS_STATE, Entry, Form, MissReason
from headstart.errors import BadRequest
from headstart.messages import Finished, Sampling, Stats, Submit, Token
from headstart.prompt.answer import AnswerText
from headstart.prompt.prompts import soon
from headstart.service.caching import Caching, Opening
from headstart.service.chats import Chat
from headstart.service.composition import check_parts, text_of
from headstart.service.conversations import Conversations, Saving
from headstart.service.heads import head_of
from headstart.service.model import ServedModel
from headstart.tokens import common_prefix


@dataclass(frozen=True)
class Options:
    """What a request says besides its prompt. `max_tokens` None: to the end of the context. `reuse` False:
    every prompt token is evaluated, nothing is taken from a cache or an earlier request. `use_cache`: the
    caches to start from, in their order, or none. `save_as`: the name under which a chat is kept once it is
    answered; for `overwrite` see Saving."""

    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    use_cache: tuple[str, ...] | None = None
    reuse: bool = True
    save_as: str | None = None
    overwrite: bool | None = None


@dataclass(frozen=True)
class Text:
    """A piece of the answer, never empty."""

    text: str


@dataclass(frozen=True)
class Result:
    """The end of an answer of `n_tokens` tokens. `cache_hit` is None when no cache was named, else whether
    the engine started from its state; all counts are the engine's. `saved_as`: the name under which the chat
    is being kept."""

    finish_reason: Literal["stop", "length"]
    n_tokens: int
    stats: Stats
    cache_hit: bool | None = None
    cache_names: Sequence[str] = ()
    miss: MissReason | None = None
    saved_as: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A request ready for the engine."""

    model: ServedModel
    submit: Submit
    stop: Sequence[str]
    entry: Entry | None = None
    opening: Opening = field(default_factory=lambda: Opening(0))
    names: Sequence[str] = ()
    saving: Saving | None = None


class Generation:
    def __init__(self, caching: Caching) -> None:
        self.caching = caching
        self.conversations = Conversations(caching)

    async def prepare_chat(
        self,
        model: ServedModel,
        messages: list[dict[str, Any]],
        options: Options,
        tools: list[dict[str, Any]] | None = None,
    ) -> Prepared:
        """Raises BadRequest, CacheNotFound, CacheConflict, ContextLengthExceeded, StorageError or
        Unavailable."""
        if options.save_as is not None:
            self.conversations.check(model, options.save_as, options.overwrite)
        own = Chat(messages, tools or [])
        entry: Entry | None = None
        if options.use_cache is None:
            chat, tokens = own, await own.tokens(model.prompts)
            opening = await self._chat_opening(model, chat, tokens)
        else:
            entry, chat, tokens, opening = await self._chat_with_cache(model, own, options.use_cache)
        prepared = self._prepared(model, tokens, options, entry, opening, "messages")
        if options.save_as is None:
            return prepared
        head = entry.name if entry else None
        return replace(prepared, saving=Saving(model, options.save_as, options.overwrite, chat, head))

    async def _chat_with_cache(
        self, model: ServedModel, own: Chat, names: Sequence[str]
    ) -> tuple[Entry, Chat, list[int], Opening]:
        opening = None
        while opening is None:
            entry = await self._named(model, names, "chat")
            chat = own.after(entry.content)
            tokens = await chat.tokens(model.prompts)
            if chat.tools == entry.tools:
                opening = await self.caching.open(model, entry, "chat", tokens)
            else:
                opening = await self._with_other_tools(model, chat, entry, tokens)
        return entry, chat, tokens, opening

    async def _with_other_tools(
        self, model: ServedModel, chat: Chat, entry: Entry, tokens: list[int]
    ) -> Opening:
        """The cache is of another prompt then, which may begin alike."""
        opening = await self._chat_opening(model, chat, tokens)
        head = await head_of(self.caching.store, model, entry, "chat", tokens)
        return replace(opening, restore=head.restore, shared=head.shared, miss="prompt_differs")

    async def _chat_opening(self, model: ServedModel, chat: Chat, tokens: list[int]) -> Opening:
        model.check_fits(len(tokens), param="messages")
        return _cut(await chat.opening(model.prompts, self.caching.store.known(model.shelf)), tokens)

    async def prepare_text(self, model: ServedModel, prompt: str, options: Options) -> Prepared:
        """Raises as `prepare_chat` does."""
        prompts = model.prompts
        if options.use_cache is None:
            tokens = await soon(lambda most: prompts.text(prompt, most))
            model.check_fits(len(tokens), param="prompt")
            known = self.caching.known_opening(model, prompt)
            opening = _cut(await soon(lambda most: prompts.text_opening(known, most)), tokens)
            return self._prepared(model, tokens, options, None, opening, "prompt")
        entry, tokens, opening = await self._text_with_cache(model, prompt, options.use_cache)
        return self._prepared(model, tokens, options, entry, opening, "prompt")

    async def _text_with_cache(
        self, model: ServedModel, prompt: str, names: Sequence[str]
    ) -> tuple[Entry, list[int], Opening]:
        opening = None
        while opening is None:
            entry = await self._named(model, names, "completion")
            tokens = await soon(partial(model.prompts.text, text_of(entry) + prompt))
            opening = await self.caching.open(model, entry, "completion", tokens)
        return entry, tokens, opening

    async def _named(self, model: ServedModel, names: Sequence[str], form: Form) -> Entry:
        """The cache of this name, or the one composed of several. Raises CacheNotFound, BadRequest, or
        StorageError where it is a conversation that could not be saved."""
        check_parts(names)
        parts = []
        for name in names:
            await self.conversations.settled(model, name)
            parts.append(await self.caching.find(model, name))
        return parts[0] if len(parts) == 1 else self.caching.derived(model, parts, form)

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
            shared=opening.shared,
            reuse=options.reuse,
        )
        if not options.reuse:
            opening = Opening(opening.boundary, miss="cache_prompt_false")
        return Prepared(model, submit, options.stop, entry, opening, options.use_cache or ())

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
                        if prepared.entry and miss is None:
                            # A write to the disk: after the answer's end has been sent.
                            asyncio.get_running_loop().call_soon(self.caching.store.used, prepared.entry)
                        if prepared.saving:
                            self.conversations.save(prepared.saving, said)
                        yield Result(
                            finish_reason="length" if reason == "length" and not answer.stopped else "stop",
                            n_tokens=n_tokens,
                            stats=stats,
                            cache_hit=None if prepared.entry is None else miss is None,
                            cache_names=prepared.names,
                            miss=miss,
                            saved_as=prepared.saving.name if prepared.saving else None,
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


def _cut(opening: list[int], tokens: list[int]) -> Opening:
    """Cuts the prefill where a cache of the opening would end, so that the answer is the same."""
    return Opening(max(min(common_prefix(opening, tokens), len(tokens) - 1), 0))
