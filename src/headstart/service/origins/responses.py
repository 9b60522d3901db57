"""Stored responses, from which others can continue: caches named by the responses' ids."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct, field

from headstart.caches.cache_file.entry_checks import RECORD
from headstart.caches.entry import Entry, Retention
from headstart.config.settings import Settings
from headstart.contents import arguments_of
from headstart.errors import CacheNotFound, HeadstartError, ResponseNotFound
from headstart.json_scan import depth
from headstart.limits import MAX_DEPTH
from headstart.names import CacheKey
from headstart.prompt.process.protocol import TextPrompt
from headstart.service.background import BackgroundTasks
from headstart.service.caching.forget import StateRemoval
from headstart.service.caching.quota import Quota
from headstart.service.interface.answer import Choice
from headstart.service.interface.chat import Chat
from headstart.service.interface.observer import Evicted
from headstart.service.interface.options import Keep, Options
from headstart.service.models.tenant_model import TenantModel
from headstart.service.origins.automatic import Automatic
from headstart.service.origins.conversations import Conversations, SaveRequest

log = logging.getLogger(__name__)

Json = dict[str, Any]


class Record(Struct, frozen=True):
    """A response as it was sent. Its chat begins with `n_cached` messages of the `caches` that it named; then
    come its instructions, unless they are among those, and then the messages that are carried on."""

    body: Json
    n_cached: Annotated[int, Meta(ge=0)] = field(default=0, name="opening")
    caches: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.body.get("instructions"), str | None):
            raise ValueError("instructions are a text")
        # The body contains the request's tools and schemas some levels further down.
        if depth(self.body) > 2 * MAX_DEPTH:
            raise ValueError("it is nested too deeply")


@dataclass(frozen=True)
class StoredResponse:
    entry: Entry
    record: Record


class Responses:
    """Used from the event loop."""

    def __init__(
        self,
        settings: Settings,
        conversations: Conversations,
        automatic: Automatic,
        quota: Quota,
        removal: StateRemoval,
    ) -> None:
        self.settings = settings
        self.conversations = conversations
        self.automatic = automatic
        self.quota = quota
        self.removal = removal
        self.store = quota.store
        self.observer = quota.observer
        self._tasks = BackgroundTasks()

    async def close(self) -> None:
        await self._tasks.close()

    def of(self, owner: str) -> list[Entry]:
        """The owner's responses, oldest first."""
        known = (entry for entry in self.store.known() if entry.origin == "response")
        return sorted((entry for entry in known if entry.owner == owner), key=lambda entry: entry.updated)

    async def find(
        self, owner: str, name: str, *, param: str, error: type[ResponseNotFound] = ResponseNotFound
    ) -> StoredResponse:
        """The owner's response with this id; waits while it is being saved. Raises `error`."""
        if saving := self.conversations.being_saved(owner, name):
            await asyncio.wait([saving])
        for entry in [entry for entry in self.of(owner) if entry.name == name]:
            # It may have expired meanwhile, or been deleted from the disk.
            if kept := self._read(entry.key):
                return kept
        raise error(
            f"There is no response {name[:80]!r}: it was not stored, was deleted or has expired. "
            "Send the whole conversation as input.",
            param=param,
        )

    def _read(self, key: CacheKey) -> StoredResponse | None:
        try:
            entry = self.store.find(key)
            return StoredResponse(entry, msgspec.json.decode(entry.retention.metadata[RECORD], type=Record))
        except (CacheNotFound, KeyError, msgspec.MsgspecError, RecursionError):
            return None

    async def delete(self, owner: str, name: str) -> None:
        """Its text is gone from the state stores, too. Raises ResponseNotFound, or as
        StateRemoval.catch_up."""
        while True:
            entry = (await self.find(owner, name, param="response_id")).entry
            build = self.conversations.caching.builds.of(entry.key)
            if build is None:
                self.store.delete(entry.key)
                return await self.removal.catch_up(entry.model)
            await asyncio.wait([build])

    def continued(self, kept: StoredResponse, instructions: str | None, said: Sequence[Json]) -> list[Json]:
        """The messages of a chat that continues the response with the messages `said`. The response's
        instructions are replaced by those given now."""
        cached, rest = (
            kept.entry.messages[: kept.record.n_cached],
            kept.entry.messages[kept.record.n_cached :],
        )
        own = system_messages(kept.record.body.get("instructions"))
        # The configured system message is for chats that have none.
        replaced = own or (self.automatic.default if instructions and not cached else [])
        if replaced and rest[:1] == replaced:
            rest = rest[1:]
        messages = [*cached, *system_messages(instructions), *rest, *said]
        return messages if cached else self.automatic.with_default(messages)

    def options(self, options: Options, kept: StoredResponse, model: TenantModel) -> Options:
        """The options of a request that continues the response; its state is usable only by its own model."""
        own = kept.entry.namespace == model.namespace
        record = kept.record
        keep = options.keep and replace(options.keep, caches=record.caches, n_cached=record.n_cached)
        return replace(options, use_cache=(kept.entry.name,) if own else None, whole=True, keep=keep)

    def keep(self, model: TenantModel, keep: Keep, chat: Chat, base: str | None, answer: Choice) -> None:
        """Starts storing the `chat` with its answer; see Conversations.keep. `base`: the name of the cache
        that the chat began with."""
        saving = SaveRequest(
            model,
            keep.name,
            keep.overwrite,
            Chat([*chat.messages, answer_message(answer)], chat.tools),
            base,
            origin="response",
            retention=Retention(
                self.settings.responses_ttl_seconds, metadata={RECORD: _written(_record(keep))}
            ),
            states=self.settings.responses_quota_mb > 0,
        )
        self._tasks.start(self._kept(self.conversations.keep(saving), saving.model.owner))

    async def _kept(self, saving: asyncio.Task[Entry], owner: str) -> None:
        """Makes room after it is stored, so that responses never exceed their quota by much."""
        await asyncio.wait([saving])
        try:
            for entry in self._movable(self.of(owner))[: -self.settings.responses_kept]:
                self.store.delete(entry.key, evicts=True)
                self.observer.evicted(Evicted(entry, entry.size_bytes))
            await self._trim()
        except HeadstartError as error:
            log.warning("old responses can't be deleted: %s", error.message)

    async def _trim(self) -> None:
        with_states = [entry for entry in self.store.known() if entry.origin == "response" and entry.forms]
        excess = sum(entry.tensor_bytes for entry in with_states) - 1e6 * self.settings.responses_quota_mb
        for entry in sorted(self._movable(with_states), key=lambda entry: entry.updated):
            if excess <= 0:
                break
            excess -= await self.quota.evict(entry)

    def _movable(self, entries: Sequence[Entry]) -> list[Entry]:
        in_use = self.store.is_in_use
        return [each for each in entries if not (each.retention.pinned or in_use(each.key))]


def system_messages(instructions: str | None) -> list[Json]:
    """Instructions as the first messages of a chat."""
    return [{"role": "system", "content": instructions}] if instructions else []


def answer_message(answer: Choice) -> Json:
    """The answer as a message of the chat, without reasoning, which templates omit in earlier turns."""
    calls = [tool_call(call.id, call.name, call.arguments) for call in answer.calls]
    message: Json = {"role": "assistant", "content": answer.text}
    return message | ({"tool_calls": calls} if calls else {})


def tool_call(call_id: str, name: str, arguments: str) -> Json:
    """A call in the form that templates take."""
    function = {"name": name, "arguments": arguments_of(arguments)}
    return {"id": call_id, "type": "function", "function": function}


async def n_tokens(model: TenantModel, text: str) -> int:
    """The number of tokens in a part of an answer, tokenised by itself."""
    return len(await model.prompts.one(TextPrompt(text))) if text else 0


def _record(keep: Keep) -> Record:
    return Record(keep.body() if keep.body else {}, keep.n_cached, keep.caches or ())


def _written(record: Record) -> str:
    return msgspec.json.encode(record).decode()
