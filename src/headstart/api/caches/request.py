"""Request bodies that create and edit caches."""

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

    cache_name: Utf8 = Field(description="The cache's name.")
    prompt: Utf8 | None = Field(
        None, description="The system message in chats; the leading text in completions."
    )
    messages: Messages | None = Field(
        None, min_length=1, description="Instead of `prompt`: the first messages of chats."
    )
    tools: Tools | None = Field(None, description="With `messages`: functions that the model may call.")
    forms: list[Form] = Field(
        list(FORMS),
        alias="for",
        min_length=1,
        description="The endpoints to build the cache for: chat, completion or both.",
    )
    allow_overwrite: bool = Field(True, description="False: answer 409 if a cache of this name exists.")
    stream: bool = Field(False, description="Report progress as server-sent events.")

    def content(self) -> Content:
        """The cache's content. Raises BadRequest unless the body has either a prompt or messages."""
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

    def requested_forms(self) -> tuple[Form, ...]:
        """The requested forms. Raises BadRequest for completion with messages."""
        if self.messages is None:
            return tuple(dict.fromkeys(self.forms))
        if "forms" in self.model_fields_set and "completion" in self.forms:
            raise BadRequest(
                "Messages are for chats only: leave completion out, or send a prompt.", param="for"
            )
        return ("chat",)


class TermsBody(Body):
    """Omitted fields keep their values; null resets a field to its default."""

    ttl_seconds: Ttl | None = Field(None, description="Seconds until the cache expires; null: never.")
    pinned: bool | None = Field(None, description="True: the cache is never evicted.")
    description: Description | None = Field(None, description="The cache's purpose, in words.")
    metadata: Metadata | None = Field(None, description="Names and texts for the client's own use.")

    def given(self) -> dict[str, Any]:
        """The retention fields that the request contains, null replaced by the default."""
        named = {
            name: getattr(self, name) for name in Retention.__struct_fields__ if name in self.model_fields_set
        }
        defaults = {name: getattr(Retention(), name) for name in named}
        return {name: defaults[name] if value is None else value for name, value in named.items()}


class CreateRequest(CacheRequest, TermsBody):
    """A cache and its retention."""


class EditRequest(TermsBody):
    def given(self) -> dict[str, Any]:
        """Raises BadRequest for fields that identify the cache or define its content."""
        for name in ("prompt", "messages", "tools", "for", "cache_name", "model"):
            if name in (self.model_extra or {}):
                raise BadRequest(f"{name} can't be edited: create the cache again.", param=name)
        return super().given()


def shown(entry: Entry, expires_at: float | None) -> dict[str, Any]:
    """The retention fields of an answer. `expires_at`: when the cache expires, as a timestamp."""
    retention = entry.retention
    return {
        "ttl_seconds": retention.ttl_seconds,
        "expires": iso_time(expires_at),
        "pinned": retention.pinned,
        "description": retention.description,
        "metadata": retention.metadata,
    }


def iso_time(seconds: float | None) -> str | None:
    """ISO 8601 in UTC; None also for a timestamp out of the calendar's range."""
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
    except (OverflowError, ValueError, OSError):
        return None
