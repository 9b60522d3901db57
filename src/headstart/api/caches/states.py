"""/v1/cache: what the state store holds, and emptying it."""

from __future__ import annotations

from typing import Any, get_args

from fastapi import APIRouter, Request

from headstart.api.auth import rank
from headstart.api.context import model_of, owner
from headstart.api.sse import while_connected
from headstart.protocol import Source
from headstart.service.service import Service

router = APIRouter(prefix="/v1/cache")

Json = dict[str, Any]


@router.delete("")
async def clear(request: Request, model: str | None = None) -> Json:
    """Empties the state store, of all models or of one: of what the key's requests computed, for admins of
    everything. Named caches stay."""
    service: Service = request.app.state.service
    name = None if model is None else model_of(request, model).name
    whose = None if rank(request) == "admin" else owner(request)
    await while_connected(request, service.caches.clear_states(whose, name))
    return {"object": "cache.cleared", "model": name, "cleared": True}


async def store_state(request: Request, model: str | None) -> Json | None:
    """The content and limits of the state stores of a model or of all; null for keys that are no admin's."""
    if rank(request) != "admin":
        return None
    service: Service = request.app.state.service
    state = await service.caches.states(model)
    report, limits = state.report, state.limits
    return {
        "memory": _tier(report.memory_bytes, report.memory_tokens, limits.memory),
        "disk": _tier(report.disk_bytes, report.disk_tokens, limits.disk),
        "chains": report.chains,
        "evictions": report.evictions,
        "hits": {source: state.hits[source] for source in get_args(Source) if source != "none"},
        "parked": report.parked,
        "park_ms": round(report.park_ms, 1),
        "given_up": report.given_up,
        "verify_failures": report.verify_failures,
        "write_failures": report.write_failures,
    }


def _tier(n_bytes: int, tokens: int, limit: int) -> Json:
    return {"bytes": n_bytes, "tokens": tokens, "limit_bytes": limit}
