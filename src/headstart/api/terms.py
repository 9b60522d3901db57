"""How a cache is kept, as requests say it and answers show it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import Field

from headstart.api.cache_body import CacheRequest
from headstart.api.schemas import Body
from headstart.caches.entry import Entry, Terms
from headstart.contents import Description, Metadata, Ttl
from headstart.errors import BadRequest


class TermsBody(Body):
    """Fields that are left out stay as they are; null takes one back."""

    ttl_seconds: Ttl | None = Field(None, description="How long the cache is kept.")
    pinned: bool | None = Field(None, description="True: its states are never given up for others.")
    description: Description | None = Field(None, description="What it is for, in words.")
    metadata: Metadata | None = Field(None, description="Pairs of texts that clients keep with it.")

    def given(self) -> dict[str, Any]:
        """The terms that the request names."""
        named = {
            name: getattr(self, name) for name in Terms.__struct_fields__ if name in self.model_fields_set
        }
        defaults = {name: getattr(Terms(), name) for name in named}
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
