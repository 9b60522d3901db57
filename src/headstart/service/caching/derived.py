"""Several caches used as one. Their combination is a derived cache, named by the hash of its content: it is
found again while its parts are unchanged; otherwise a new one is created."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from time import time
from typing import Any

from headstart.caches.entry import Content, Entry, Form
from headstart.errors import BadRequest, InvalidName
from headstart.names import check_name
from headstart.service.interface.sameness import same_tools
from headstart.service.models.tenant_model import TenantModel

MOST_PARTS = 8
# Prefix reserved for derived caches.
DERIVED = "derived-"


def check_own_name(name: str, *, param: str) -> str:
    """The name, if a client may give it to a cache. Raises InvalidName."""
    if check_name(name, param=param).startswith(DERIVED):
        raise InvalidName(f"Names that begin with {DERIVED!r} are reserved for the server.", param=param)
    return name


def check_parts(names: Sequence[str]) -> None:
    """Raises BadRequest unless these caches can be combined."""
    if not names:
        raise BadRequest("use_cache names no cache: leave it out.", param="use_cache")
    if len(names) > MOST_PARTS:
        raise BadRequest(f"use_cache names {len(names)} caches; {MOST_PARTS} is the most.", param="use_cache")
    for name in names:
        check_name(name, param="use_cache")
        if names.count(name) > 1:
            raise BadRequest(f"use_cache names {name!r} more than once.", param="use_cache")


def text_of(entry: Entry) -> str:
    """The prompt of the cache, with which a completion begins. Raises BadRequest if the cache has none."""
    if not entry.prompt:
        raise BadRequest(
            f"The cache {entry.name!r} holds chat messages: completions can't use it.", param="use_cache"
        )
    return entry.prompt


def composed(model: TenantModel, parts: Sequence[Entry], form: Form) -> Entry:
    """The derived cache of these parts in one form, as version 0 and without a state. A lookup of its name
    shows whether it is stored. Raises BadRequest."""
    for part in parts:
        if part.origin == "derived":
            raise BadRequest(
                f"The cache {part.name!r} is derived from others: name those instead.", param="use_cache"
            )
    content = _content(parts, form)
    return Entry(
        model=model.name,
        name=_name(content),
        prompt=content.prompt,
        messages=content.messages,
        tools=content.tools,
        origin="derived",
        parts=[part.name for part in parts],
        evicted=[form],
        owner=model.owner,
        version=0,
        created=time(),
        updated=time(),
        fingerprint=model.fingerprint,
        forms={},
        build_ms=0,
        ttft_ms=0,
    )


def _content(parts: Sequence[Entry], form: Form) -> Content:
    if form == "completion":
        return Content("".join(map(text_of, parts)))
    tools: list[dict[str, Any]] = []
    for part in parts:
        tools += [tool for tool in part.tools if not any(same_tools([tool], [other]) for other in tools)]
    return Content(
        messages=[message for part in parts for message in part.content.prefix_messages], tools=tools
    )


def _name(content: Content) -> str:
    written = json.dumps([content.prompt, content.messages, content.tools])
    return DERIVED + hashlib.sha256(written.encode()).hexdigest()[:32]
