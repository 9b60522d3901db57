"""Storage of a response while its answer is generated."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace

import msgspec

from headstart.api.writer import Events, Json
from headstart.service.generation.generate import Result
from headstart.service.generation.prepared import Prepared
from headstart.service.interface.answer import Choice
from headstart.service.origins.responses import Kept, Record, n_tokens
from headstart.service.service import Service


async def kept(
    service: Service, events: Events, prepared: Prepared, before: Kept | None, body: Json
) -> Events:
    """`events` with the number of reasoning tokens in their Result. Stores the response when the next event
    after the Result is requested: `body` must be complete then. `prepared.saving`: how to store it; None: not
    at all. `before`: the response that it continues."""
    answer = Choice(0)
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Result):
                n_reasoning = await n_tokens(prepared.model, answer.reasoning)
                yield replace(event, n_reasoning=n_reasoning)
            else:
                answer.add(event)
                yield event
    if prepared.saving:
        service.responses.keep(prepared.saving, answer, _record(prepared, before, body))


def _record(prepared: Prepared, before: Kept | None, body: Json) -> Record:
    if before:
        return msgspec.structs.replace(before.record, body=body)
    opening = len(prepared.entry.content.opening) if prepared.entry else 0
    return Record(body, opening, prepared.names)
