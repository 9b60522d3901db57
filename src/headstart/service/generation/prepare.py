"""From a request to the engine's input: its tokens, where prefill is cut, the state it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from headstart.caches.entry import Content, Entry, Form
from headstart.errors import BadRequest
from headstart.prompt.process.protocol import TextOpening
from headstart.protocol import Submit
from headstart.service.caching.builder import opening_if_any
from headstart.service.caching.caching import Caching
from headstart.service.caching.derived import check_parts, text_of
from headstart.service.caching.lookup import Start
from headstart.service.caching.prefix import opening_of, prefix_of
from headstart.service.generation import engine_support
from headstart.service.generation.engine_support import check_bias
from headstart.service.generation.explain import closest, longest_match, texts_of
from headstart.service.generation.grammars import Grammars
from headstart.service.generation.prepared import Prepared
from headstart.service.generation.tool_calls import reading
from headstart.service.interface.chat import Chat
from headstart.service.interface.options import Options
from headstart.service.interface.text import Text
from headstart.service.models.model import ServedModel
from headstart.service.origins.automatic import Automatic, ImplicitMatch
from headstart.service.origins.breakpoints import BreakpointPlan, Breakpoints, PlacedBreakpoint
from headstart.service.origins.conversations import Conversations, Saving
from headstart.tokens import common_prefix

Json = dict[str, Any]


class Preparation:
    """Prepares requests. All methods raise BadRequest, CacheNotFound, CacheConflict, ContextLengthExceeded,
    StorageError or Unavailable."""

    def __init__(
        self,
        caching: Caching,
        automatic: Automatic,
        conversations: Conversations,
        marks: Breakpoints,
        grammars: Grammars,
    ) -> None:
        self.caching = caching
        self.automatic = automatic
        self.conversations = conversations
        self.grammars = grammars
        self.marks = marks

    async def chat(
        self, model: ServedModel, messages: list[Json], options: Options, tools: list[Json] | None = None
    ) -> Prepared:
        if options.save_as is not None:
            self.conversations.check(model, options.save_as, options.overwrite)
        own = Chat(messages, tools or [], options.variables)
        if options.use_cache is None:
            chat = replace(own, messages=self.automatic.with_default(messages))
            added = len(chat.messages) - len(messages)
            marks = [replace(mark, messages=mark.messages + added) for mark in options.marks]
            prepared = await self._chat_without_cache(model, chat, replace(options, marks=marks))
        else:
            entry, chat, tokens, opening = await self._chat_with_cache(model, own, options)
            prepared = self._prepared(model, tokens, options, entry, opening, "chat")
        prepared = await self._to_be_read(prepared, chat, options)
        if options.save_as is not None:
            head = prepared.entry.name if prepared.entry else None
            saving = Saving(model, options.save_as, options.overwrite, chat, head)
            prepared = replace(prepared, saving=saving)
        return await self._explaining(prepared, "chat", texts_of(messages)) if options.explain else prepared

    async def _chat_without_cache(self, model: ServedModel, chat: Chat, options: Options) -> Prepared:
        """A chat that names no cache may start from a cache with the same prefix."""
        begun = self._begun(model, chat)
        tokens, wanted = await model.prompts.with_opening(chat.prompt, opening_of("chat", begun))
        model.check_fits(len(tokens), param="messages")
        opening = _cut(wanted or [], tokens)
        places = await self.marks.place(model, chat, options.marks, tokens)
        if places:
            wanted = None
            begun, opening = await self._marked_opening(model, chat, tokens, places[-1])
        if not options.reuse:
            return self._prepared(model, tokens, options, None, opening, "chat")
        unnamed = await self.automatic.look(model, begun, tokens, opening.boundary, wanted)
        opening = replace(opening, restore=unnamed.restore if unnamed else None)
        head = None
        if unnamed and unnamed.entry is None:
            head, opening = await self._from_shorter(model, chat, tokens, opening)
            # A breakpoint's prefix is cached at once, not counted.
            unnamed = None if begun in [place.content for place in places] else unnamed
        prepared = self._prepared(model, tokens, options, None, opening, "chat", unnamed)
        return replace(prepared, marked=BreakpointPlan(places, head)) if places else prepared

    def _begun(self, model: ServedModel, chat: Chat) -> Content:
        """The longest prefix of the chat that a cache has or could have."""
        return chat.opening(list(self.caching.namespaces.known(model, "chat")))

    async def _marked_opening(
        self, model: ServedModel, chat: Chat, tokens: list[int], last: PlacedBreakpoint
    ) -> tuple[Content, Start]:
        """The longest prefix that a cache holds, or will hold up to the `last` breakpoint, and the cut at its
        end. Breakpoints replace the system prompt here."""
        begun = chat.held(self.caching.namespaces.known(model, "chat")) or last.content
        opening = _cut(await opening_if_any(model, "chat", begun), tokens)
        # A state that can't be cut helps only requests that begin with all of it.
        if last.boundary > opening.boundary and model.info.can_cut:
            return last.content, Start(last.boundary)
        return begun, opening

    async def _from_shorter(
        self, model: ServedModel, chat: Chat, tokens: list[int], opening: Start
    ) -> tuple[Entry | None, Start]:
        """If the prefix has no cache: the longest cached prefix of the chat, and how to start from it."""
        held = chat.held(self.caching.namespaces.known(model, "chat"))
        found = await self.caching.unnamed(model, held, tokens) if held else None
        if found is None or found[1].restore is None:
            return None, opening
        entry, start = found
        return entry, replace(opening, restore=start.restore, shared=start.boundary)

    async def _chat_with_cache(
        self, model: ServedModel, own: Chat, options: Options
    ) -> tuple[Entry, Chat, list[int], Start]:
        opening = None
        while opening is None:
            entry = await self._named(model, options.use_cache or (), "chat")
            chat = own if options.whole else own.after(entry.content)
            if chat.begins_with(entry.content):
                asked = chat.prompt, opening_of("chat", entry.content)
                tokens, wanted = await model.prompts.with_opening(*asked)
                opening = await self.caching.open(model, entry, "chat", tokens, wanted)
            else:
                tokens = await model.prompts.one(chat.prompt)
                opening = await self._differing(model, chat, entry, tokens)
        return entry, chat, tokens, opening

    async def _differing(self, model: ServedModel, chat: Chat, entry: Entry, tokens: list[int]) -> Start:
        """How to start if the chat doesn't begin with the named cache's content: a common prefix may still be
        used."""
        model.check_fits(len(tokens), param="messages")
        opening = _cut(await opening_if_any(model, "chat", self._begun(model, chat)), tokens)
        head = await prefix_of(self.caching.store, model, entry, "chat", tokens)
        return replace(opening, restore=head.restore, shared=head.shared, miss="prompt_differs")

    async def count(
        self, model: ServedModel, messages: list[Json], options: Options, tools: list[Json] | None = None
    ) -> int:
        """The number of tokens in the prompt of such a chat."""
        own = Chat(messages, tools or [], options.variables)
        if options.use_cache is None:
            chat = replace(own, messages=self.automatic.with_default(messages))
        else:
            chat = own.after((await self._named(model, options.use_cache, "chat")).content)
        return len(await model.prompts.one(chat.prompt))

    async def text(self, model: ServedModel, prompt: Text, options: Options) -> Prepared:
        prompts = model.prompts
        entry = None
        if options.use_cache is None:
            tokens = await prompt.read(prompts)
            model.check_fits(len(tokens), param="prompt")
            known = self.caching.namespaces.known_opening(model, prompt.whole(model.vocabulary))
            opening = _cut(await prompts.one(TextOpening(known)), tokens)
        else:
            entry, tokens, opening = await self._text_with_cache(model, prompt, options.use_cache)
        prepared = self._prepared(model, tokens, options, entry, opening, "completion")
        if not options.explain:
            return prepared
        return await self._explaining(prepared, "completion", [prompt.whole(model.vocabulary)])

    async def _text_with_cache(
        self, model: ServedModel, prompt: Text, names: Sequence[str]
    ) -> tuple[Entry, list[int], Start]:
        opening = None
        while opening is None:
            entry = await self._named(model, names, "completion")
            tokens = await prompt.read(model.prompts, text_of(entry))
            opening = await self.caching.open(model, entry, "completion", tokens)
        return entry, tokens, opening

    async def _named(self, model: ServedModel, names: Sequence[str], form: Form) -> Entry:
        """The cache of this name, or the one composed of several. Raises CacheNotFound, BadRequest, or
        StorageError for a conversation that could not be saved."""
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
        opening: Start,
        form: Form,
        unnamed: ImplicitMatch | None = None,
    ) -> Prepared:
        begun = entry or (unnamed and unnamed.entry)
        warning = self._check_parameters(model, options)
        param = "messages" if form == "chat" else "prompt"
        if not tokens:
            raise BadRequest("The prompt is empty.", param=param)
        model.check_fits(len(tokens), param=param)
        check_bias(model, options.sampling.logit_bias)
        if options.n > model.info.slots:
            raise BadRequest(
                f"n = {options.n} is more than this model's {model.info.slots} slots: ask for fewer answers "
                "or start the server with more --slots.",
                param="n",
            )
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
            owner=model.owner,
            public=opening.boundary if begun and not begun.owner else 0,
            n=options.n,
            text=model.text(tokens, param=param),
        )
        if not options.reuse:
            opening = Start(opening.boundary, miss="cache_prompt_false")
        remembered = self.caching.store.remembered(model.namespace, form)
        matched = opening.boundary if entry else longest_match(remembered, tokens)
        names = options.use_cache or ()
        return Prepared(
            model, submit, options.stop, entry, opening, names, unnamed, matched=matched, warning=warning
        )

    def _check_parameters(self, model: ServedModel, options: Options) -> str:
        """A warning about overridden parameters, or "". Raises BadRequest for parameters that the engine
        doesn't have."""
        engine_support.check(model, options.given)
        if options.sampling.grammar:
            engine_support.check(model, ["grammar"])
        names = engine_support.overridden(model.info, options.sampling, options.given)
        if names and model.settings.rkllm_other_sampling == "refuse":
            raise engine_support.refusal(model, names)
        return engine_support.warning(model.info, names) if names else ""

    async def _to_be_read(self, prepared: Prepared, chat: Chat, options: Options) -> Prepared:
        """Adds how answers are read, according to the chat's tools and the model's template."""
        submit = prepared.submit
        how = reading(prepared.model.vocabulary, chat.tools, options.calling, submit.tokens)
        if how.grammar:
            engine_support.check(prepared.model, ["grammar"], because="tool_choice")
            await self.grammars.check(how.grammar, param="tools", owner=prepared.model.owner)
            sampling = msgspec.structs.replace(submit.sampling, grammar=how.grammar)
            submit = msgspec.structs.replace(submit, sampling=sampling)
        return replace(prepared, submit=submit, parser=how.parser, piece=how.piece)

    async def _explaining(self, prepared: Prepared, form: Form, texts: Sequence[str]) -> Prepared:
        """The same request, whose result will explain why it started from a cache or didn't."""
        store, model = self.caching.store, prepared.model
        known = [prepared.entry] if prepared.entry else store.entries(model.namespace)
        return replace(prepared, explain=True, closest=await closest(model, form, known, texts))


def _cut(opening: list[int], tokens: list[int]) -> Start:
    """Cuts the prefill where a cache of this prefix would end, so that the answer is the same."""
    return Start(max(min(common_prefix(opening, tokens), len(tokens) - 1), 0))
