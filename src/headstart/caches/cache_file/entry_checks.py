"""Entries that come from outside the program: out of a cache's file, or from any copy of it. None is used
before it went through here."""

from __future__ import annotations

import msgspec
from msgspec.structs import asdict, replace
from pydantic import ValidationError

from headstart.caches.entry import Content, Entry, Retention
from headstart.contents import KeptContent, KeptTerms

# Of a stored response's metadata what holds the response itself, which is as long as that is.
RECORD = "response"


def entry_of(text: str | bytes) -> Entry:
    """The entry that the JSON text describes, its messages as chats have them. Where it says that it belongs,
    `model`, `name` and `owner`, may be anything: that must be compared with where it lies. Raises ValueError,
    which names the field that isn't as it should be."""
    try:
        entry = msgspec.json.decode(text, type=Entry)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not set(entry.evicted) <= set(entry.content.forms) or len(set(entry.evicted)) < len(entry.evicted):
        raise ValueError("evicted: there are no such forms of what it holds")
    _check_terms(entry.terms, kept=True)
    content = checked(entry.content)
    # Only what is derived has parts, whose end is its own.
    parts = entry.parts if entry.origin == "derived" else []
    if (content, parts) == (entry.content, entry.parts):
        return entry
    return replace(entry, messages=content.messages, parts=parts)


def checked(content: Content) -> Content:
    """It, as caches hold it. Raises ValueError, which names the field that isn't as it should be."""
    try:
        kept = KeptContent.model_validate(asdict(content))
    except ValidationError as error:
        raise ValueError(_told(error)) from None
    return Content(content.prompt, [message.plain() for message in kept.messages], content.tools)


def check_terms(terms: Retention) -> None:
    """Raises ValueError for what a request couldn't say either."""
    _check_terms(terms, kept=False)


def _check_terms(terms: Retention, *, kept: bool) -> None:
    said = asdict(terms)
    if kept:
        said["metadata"] = {key: value for key, value in terms.metadata.items() if key != RECORD}
    try:
        KeptTerms.model_validate(said)
    except ValidationError as error:
        raise ValueError(f"terms.{_told(error)}") from None


def _told(error: ValidationError) -> str:
    """The first thing that is wrong, and where."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]
