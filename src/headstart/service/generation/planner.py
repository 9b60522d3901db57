"""Plans prompts: their tokens, where prefill is cut, and the state that their evaluation starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from headstart.caches.entry import Content, Entry, Form
from headstart.prompt.process.protocol import TextPrefix
from headstart.service.caching.builder import prefix_tokens_if_any
from headstart.service.caching.caching import Caching
from headstart.service.caching.derived import check_parts, text_of
from headstart.service.caching.lookup import Start
from headstart.service.caching.prefix import prefix_of, prefix_request
from headstart.service.interface.chat import Chat
from headstart.service.interface.options import Options
from headstart.service.interface.sameness import SameMessages
from headstart.service.interface.text import Text
from headstart.service.models.tenant_model import TenantModel
from headstart.service.origins.automatic import Automatic, ImplicitMatch
from headstart.service.origins.breakpoints import BreakpointPlan, Breakpoints, PlacedBreakpoint
from headstart.service.origins.conversations import Conversations
from headstart.tokens import common_prefix

# Fewer tokens of a cache that a chat doesn't continue are not worth reading its file.
LEAST = 64


@dataclass(frozen=True)
class PlannedPrompt:
    """A prompt's tokens, and how their evaluation starts. `entry`: the cache that the request names, or the
    combination of several. `match`: the implicit match of a chat that names none. `chat`: the whole chat,
    with the messages of caches and settings; None for a text."""

    tokens: list[int]
    start: Start
    entry: Entry | None = None
    match: ImplicitMatch | None = None
    breakpoints: BreakpointPlan | None = None
    chat: Chat | None = None

    @property
    def base(self) -> str | None:
        """The name of the cache that the request names."""
        return self.entry.name if self.entry else None


@dataclass(frozen=True)
class Near:
    """A cache that begins like a chat which names none. `cut`: the number of tokens in common. `is_longer`:
    more messages are the same than those of the chat's cacheable prefix."""

    entry: Entry
    cut: int
    is_longer: bool


class PromptPlanner:
    """All methods raise BadRequest, CacheNotFound, ContextLengthExceeded, StorageError or Unavailable."""

    def __init__(
        self,
        caching: Caching,
        automatic: Automatic,
        conversations: Conversations,
        breakpoints: Breakpoints,
    ) -> None:
        self.caching = caching
        self.automatic = automatic
        self.conversations = conversations
        self.breakpoints = breakpoints

    async def chat(self, model: TenantModel, own: Chat, options: Options) -> PlannedPrompt:
        if options.use_cache is None:
            return await self._unnamed_chat(model, own, options)
        return await self._named_chat(model, own, options.use_cache, whole=options.whole)

    async def _unnamed_chat(self, model: TenantModel, own: Chat, options: Options) -> PlannedPrompt:
        """A chat that names no cache may start from a cache with the same prefix."""
        chat = replace(own, messages=self.automatic.with_default(own.messages))
        prefix = self._cacheable_prefix(model, chat)
        tokens, expected = await model.prompts.with_prefix(chat.prompt, prefix_request("chat", prefix))
        model.check_fits(len(tokens), param="messages")
        boundary = _cut(expected or [], tokens)
        places = await self._places(model, chat, own, options, tokens)
        if places:
            expected = None
            prefix, boundary = await self._cached_or_placed(model, chat, tokens, places[-1])
        near = await self._near(model, chat, prefix, tokens)
        # A cache that only differs in how it is written is cut like one with the chat's own messages.
        cut = near.cut if near and near.is_longer and not places else boundary
        if not options.reuse:
            return PlannedPrompt(tokens, Start(max(cut, boundary)), chat=chat)
        match = await self.automatic.look(model, prefix, tokens, boundary, expected)
        base, start = None, Start(boundary)
        if match and match.start:
            start = replace(start, restore=match.start.restore, shared=match.start.shared)
        if match and match.entry is None:
            base, start = await self._from_shorter(model, chat, tokens, boundary)
            # A breakpoint's prefix is cached at once, not counted.
            match = None if prefix in [place.content for place in places] else match
        if near:
            base, start = await self._from_near(model, near, tokens, base, start, max(cut, boundary))
        plan = BreakpointPlan(places, base) if places else None
        return PlannedPrompt(tokens, start, match=match, breakpoints=plan, chat=chat)

    async def _places(
        self, model: TenantModel, chat: Chat, own: Chat, options: Options, tokens: list[int]
    ) -> list[PlacedBreakpoint]:
        """The request's breakpoints, placed in the chat with the configured system message."""
        added = len(chat.messages) - len(own.messages)
        breakpoints = [replace(each, messages=each.messages + added) for each in options.breakpoints]
        return await self.breakpoints.place(model, chat, breakpoints, tokens)

    def _cacheable_prefix(self, model: TenantModel, chat: Chat) -> Content:
        """The longest prefix of the chat that a cache has or could have."""
        return chat.cacheable_prefix(list(self.caching.namespaces.known(model, "chat")))

    async def _cached_or_placed(
        self, model: TenantModel, chat: Chat, tokens: list[int], last: PlacedBreakpoint
    ) -> tuple[Content, int]:
        """The longest prefix that a cache holds, or will hold up to the `last` breakpoint, and the cut at its
        end. Breakpoints replace the system prompt here."""
        prefix = chat.cached_prefix(self.caching.namespaces.known(model, "chat")) or last.content
        boundary = _cut(await prefix_tokens_if_any(model, "chat", prefix), tokens)
        # A state that can't be cut helps only requests that begin with all of it.
        if last.boundary > boundary and model.info.can_cut:
            return last.content, last.boundary
        return prefix, boundary

    async def _from_shorter(
        self, model: TenantModel, chat: Chat, tokens: list[int], boundary: int
    ) -> tuple[Entry | None, Start]:
        """If the prefix has no cache: the longest cached prefix of the chat, and how to start from it."""
        cached_prefix = chat.cached_prefix(self.caching.namespaces.known(model, "chat"))
        found = await self.caching.match(model, cached_prefix, tokens) if cached_prefix else None
        if found is None or found[1].restore is None:
            return None, Start(boundary)
        entry, start = found
        return entry, Start(boundary, restore=start.restore, shared=start.boundary)

    async def _near(self, model: TenantModel, chat: Chat, prefix: Content, tokens: list[int]) -> Near | None:
        """The cache that has more in common with the chat's beginning than `prefix`, or as much if no cache
        holds that."""
        if not model.info.can_cut:
            return None
        found = chat.nearest(self.caching.namespaces.known(model, "chat"), _same(model))
        if found is None or found.entry is None:
            return None
        is_longer = found.n_messages > len(prefix.messages)
        if not is_longer and self.caching.holding(model, prefix):
            return None
        cut = _cut(await prefix_tokens_if_any(model, "chat", found.entry.content), tokens)
        return Near(found.entry, cut, is_longer) if cut >= LEAST else None

    async def _from_near(
        self,
        model: TenantModel,
        near: Near,
        tokens: list[int],
        base: Entry | None,
        start: Start,
        boundary: int,
    ) -> tuple[Entry | None, Start]:
        """How to start from `near`, or from `base` as `start` says if that has more of the prompt."""
        usable = min(start.boundary if start.shared is None else start.shared, start.boundary)
        if boundary > start.boundary:
            start = replace(start, boundary=boundary, shared=usable)
        if start.restore and usable >= min(near.cut, boundary):
            return base, start
        common = await prefix_of(self.caching.store, model, near.entry, "chat", tokens)
        if common.restore is None:
            return base, start
        return near.entry, replace(start, restore=common.restore, shared=common.shared)

    async def _named_chat(
        self, model: TenantModel, own: Chat, names: Sequence[str], *, whole: bool
    ) -> PlannedPrompt:
        start = None
        while start is None:
            entry = await self._named(model, names, "chat")
            chat = (own.worded_as if whole else own.after)(entry.content, _same(model))
            if chat.begins_with(entry.content):
                request = chat.prompt, prefix_request("chat", entry.content)
                tokens, expected = await model.prompts.with_prefix(*request)
                start = await self.caching.open(model, entry, "chat", tokens, expected)
            else:
                tokens = await model.prompts.one(chat.prompt)
                start = await self._differing(model, chat, entry, tokens)
        return PlannedPrompt(tokens, start, entry, chat=chat)

    async def _differing(self, model: TenantModel, chat: Chat, entry: Entry, tokens: list[int]) -> Start:
        """How to start if the chat doesn't begin with the named cache's content: a common prefix may still be
        used."""
        model.check_fits(len(tokens), param="messages")
        boundary = _cut(
            await prefix_tokens_if_any(model, "chat", self._cacheable_prefix(model, chat)), tokens
        )
        common = await prefix_of(self.caching.store, model, entry, "chat", tokens)
        return Start(boundary, restore=common.restore, shared=common.shared, miss="prompt_differs")

    async def count(self, model: TenantModel, own: Chat, names: Sequence[str] | None) -> int:
        """The number of tokens in the prompt of such a chat."""
        if names is None:
            chat = replace(own, messages=self.automatic.with_default(own.messages))
        else:
            chat = own.after((await self._named(model, names, "chat")).content, _same(model))
        return len(await model.prompts.one(chat.prompt))

    async def text(self, model: TenantModel, prompt: Text, names: Sequence[str] | None) -> PlannedPrompt:
        if names is not None:
            return await self._named_text(model, prompt, names)
        prompts = model.prompts
        tokens = await prompt.read(prompts)
        model.check_fits(len(tokens), param="prompt")
        known = self.caching.namespaces.known_prefix(model, prompt.whole(model.vocabulary))
        return PlannedPrompt(tokens, Start(_cut(await prompts.one(TextPrefix(known)), tokens)))

    async def _named_text(self, model: TenantModel, prompt: Text, names: Sequence[str]) -> PlannedPrompt:
        start = None
        while start is None:
            entry = await self._named(model, names, "completion")
            tokens = await prompt.read(model.prompts, text_of(entry))
            start = await self.caching.open(model, entry, "completion", tokens)
        return PlannedPrompt(tokens, start, entry)

    async def _named(self, model: TenantModel, names: Sequence[str], form: Form) -> Entry:
        """The cache of this name, or the one composed of several. Raises CacheNotFound, BadRequest, or
        StorageError for a conversation that could not be saved."""
        check_parts(names)
        parts = []
        for name in names:
            await self.conversations.wait_saved(model, name)
            parts.append(await self.caching.find(model, name))
        return parts[0] if len(parts) == 1 else self.caching.derived(model, parts, form)


def _same(model: TenantModel) -> SameMessages:
    return SameMessages(model.vocabulary.call_format.parser, model.vocabulary.reasons)


def _cut(prefix: list[int], tokens: list[int]) -> int:
    """The place to cut the prefill: where a cache of this prefix would end, so that the answer is the
    same."""
    return max(min(common_prefix(prefix, tokens), len(tokens) - 1), 0)
