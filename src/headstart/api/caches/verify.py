"""POST /v1/verify: checks caches and, on request, repairs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.responses import Response

from headstart.api.auth import rank
from headstart.api.context import owner
from headstart.api.fields.generation import Body
from headstart.api.fields.values import Utf8
from headstart.api.sse import BEGIN_SECONDS, EventStream, as_event, start_events, while_connected
from headstart.service.caching.verify import Verdict, VerifyScope
from headstart.service.service import Service

router = APIRouter(prefix="/v1")

Json = dict[str, Any]


class VerifyRequest(Body):
    model: Utf8 | None = Field(None, description="Only this model's caches.")
    cache_name: Utf8 | None = Field(None, description="Only caches of this name.")
    repair: bool = Field(False, description="Rebuild damaged and unfit caches from their content.")
    remove_unreadable: bool = Field(
        False,
        description="With `repair`: delete files whose content can't be read, instead of setting them aside.",
    )
    stream: bool = Field(False, description="Send each cache's verdict as a server-sent event.")


@router.post("/verify")
async def verify(request: Request, body: VerifyRequest) -> Response:
    """Checks the hashes of cache files on disk, and whether requests would start from each cache. Covers the
    key's own caches, or all if the key is an admin's or there are no keys."""
    service: Service = request.app.state.service
    model = None if body.model is None else service.settings.aliases.get(body.model, body.model)
    whose = "" if rank(request) == "admin" else owner(request)
    scope = VerifyScope(model, body.cache_name, body.repair, body.remove_unreadable, whose)
    verdicts = service.caches.verify(scope)
    if body.stream:
        return EventStream(await start_events(request, _events(verdicts), BEGIN_SECONDS))
    return JSONResponse(await while_connected(request, _whole(verdicts)))


async def _events(verdicts: AsyncGenerator[Verdict, None]) -> AsyncGenerator[bytes, None]:
    known = []
    async with aclosing(verdicts):
        async for verdict in verdicts:
            known.append(verdict)
            yield as_event({"object": "cache.verdict", **msgspec.structs.asdict(verdict)})
    yield as_event(_summary(known))


async def _whole(verdicts: AsyncGenerator[Verdict, None]) -> Json:
    known = [verdict async for verdict in verdicts]
    return _summary(known) | {"data": [msgspec.structs.asdict(verdict) for verdict in known]}


def _summary(verdicts: list[Verdict]) -> Json:
    states = Counter(verdict.state for verdict in verdicts)
    return {
        "object": "cache.verification",
        "checked": len(verdicts),
        **{state: states[state] for state in ("ok", "damaged", "unfit", "stray")},
        "repaired": sum(verdict.action == "rebuilt" for verdict in verdicts),
        "wrong": sum(verdict.is_wrong for verdict in verdicts),
    }
