"""What a cache is made of, as requests say it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import ConfigDict, Field

from headstart.api.fields.generation import Body, Messages
from headstart.api.fields.tools import Tools
from headstart.caches.entry import FORMS, Content, Entry, Form, Retention
from headstart.contents import Description, Metadata, Ttl, Utf8
from headstart.errors import BadRequest


class CacheRequest(Body):
    model_config = ConfigDict(extra="allow", populate_by_name=True)

    cache_name: Utf8 = Field(description="What requests name it by.")
    prompt: Utf8 | None = Field(
        None, description="The system prompt in chats; the leading text in completions."
    )
    messages: Messages | None = Field(
        None, min_length=1, description="Instead of a prompt: what chats begin with."
    )
    tools: Tools | None = Field(None, description="With messages: functions the model may call.")
    forms: list[Form] = Field(
        list(FORMS), alias="for", min_length=1, description="What the cache is for: chat, completion or both."
    )
    allow_overwrite: bool = Field(True, description="False: 409 when there is one of this name.")
    stream: bool = Field(False, description="Report progress as server-sent events.")

    def content(self) -> Content:
        """Raises BadRequest unless there is a prompt or there are messages."""
        if self.messages is None:
            if self.prompt is None:
                raise BadRequest("A cache needs a prompt or messages.", param="prompt")
            if self.tools:
                raise BadRequest(
                    "tools go with messages; send the prompt as the first of them.", param="tools"
                )
            return Content(self.prompt)
        if self.prompt is not None:
            raise BadRequest("A cache has either a prompt or messages.", param="messages")
        return Content(messages=[message.plain() for message in self.messages], tools=self.tools or [])

    def wanted(self) -> tuple[Form, ...]:
        """The forms asked for. Raises BadRequest for those that messages don't have."""
        if self.messages is None:
            return tuple(dict.fromkeys(self.forms))
        if "forms" in self.model_fields_set and "completion" in self.forms:
            raise BadRequest(
                "Messages are for chats only: leave completion out, or send a prompt.", param="for"
            )
        return ("chat",)


class TermsBody(Body):
    """Fields that are left out stay as they are; null takes one back."""

    ttl_seconds: Ttl | None = Field(None, description="How long the cache is kept.")
    pinned: bool | None = Field(None, description="True: its states are never given up for others.")
    description: Description | None = Field(None, description="What it is for, in words.")
    metadata: Metadata | None = Field(None, description="Pairs of texts that clients keep with it.")

    def given(self) -> dict[str, Any]:
        """The terms that the request names."""
        named = {
            name: getattr(self, name) for name in Retention.__struct_fields__ if name in self.model_fields_set
        }
        defaults = {name: getattr(Retention(), name) for name in named}
        return {name: defaults[name] if value is None else value for name, value in named.items()}


class CreateRequest(CacheRequest, TermsBody):
    """A cache, and how it is kept."""


class EditRequest(TermsBody):
    def given(self) -> dict[str, Any]:
        """Raises BadRequest for what makes a cache another one."""
        for name in ("prompt", "messages", "tools", "for", "cache_name", "model"):
            if name in (self.model_extra or {}):
                raise BadRequest(f"{name} can't be edited: create the cache again.", param=name)
        return super().given()


def shown(entry: Entry, ends: float | None) -> dict[str, Any]:
    """The fields of an answer."""
    terms = entry.terms
    return {
        "ttl_seconds": terms.ttl_seconds,
        "expires": iso_time(ends),
        "pinned": terms.pinned,
        "description": terms.description,
        "metadata": terms.metadata,
    }


def iso_time(seconds: float | None) -> str | None:
    """In UTC; None also for what no calendar has."""
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
    except (OverflowError, ValueError, OSError):
        return None
