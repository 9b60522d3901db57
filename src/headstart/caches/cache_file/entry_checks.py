"""Validation of entries from outside the program: from a cache file or any copy of its header. No entry is
used before this check."""

from __future__ import annotations

import msgspec
from msgspec.structs import asdict, replace
from pydantic import ValidationError

from headstart.caches.entry import Content, Entry, Retention
from headstart.contents import KeptContent, KeptTerms

# The metadata key of a stored response that holds the response itself; its value has no length limit.
RECORD = "response"


def entry_of(text: str | bytes) -> Entry:
    """Decodes an entry from JSON, with its messages as chats have them. `model`, `name` and `owner` may be
    anything: compare them with the file's path. Raises ValueError, which names the invalid field."""
    try:
        entry = msgspec.json.decode(text, type=Entry)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not set(entry.evicted) <= set(entry.content.forms) or len(set(entry.evicted)) < len(entry.evicted):
        raise ValueError("evicted: there are no such forms of what it holds")
    _check_retention(entry.retention, kept=True)
    content = checked(entry.content)
    # Only a derived cache has parts; in others they are dropped.
    parts = entry.parts if entry.origin == "derived" else []
    if (content, parts) == (entry.content, entry.parts):
        return entry
    return replace(entry, messages=content.messages, parts=parts)


def checked(content: Content) -> Content:
    """The content in the form in which caches hold it. Raises ValueError, which names the invalid field."""
    try:
        kept = KeptContent.model_validate(asdict(content))
    except ValidationError as error:
        raise ValueError(_first_error(error)) from None
    return Content(content.prompt, [message.plain() for message in kept.messages], content.tools)


def check_retention(retention: Retention) -> None:
    """Raises ValueError for retention that a request couldn't set either."""
    _check_retention(retention, kept=False)


def _check_retention(retention: Retention, *, kept: bool) -> None:
    fields = asdict(retention)
    if kept:
        fields["metadata"] = {key: value for key, value in retention.metadata.items() if key != RECORD}
    try:
        KeptTerms.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"terms.{_first_error(error)}") from None


def _first_error(error: ValidationError) -> str:
    """The first error and its place."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]
