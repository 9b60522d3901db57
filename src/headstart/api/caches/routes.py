"""/v1/cache: create, list, show, edit and delete named caches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from headstart.api.auth import check_admin, rank
from headstart.api.caches.request import CreateRequest, EditRequest, iso_time, shown
from headstart.api.caches.states import store_state
from headstart.api.context import model_of, owner
from headstart.api.sse import BEGIN_SECONDS, EventStream, as_event, start_events, while_connected
from headstart.caches.entry import Entry
from headstart.errors import ModelLoading
from headstart.service.models.tenant_model import TenantModel
from headstart.service.service import Service

router = APIRouter(prefix="/v1/cache")

SHORT_PROMPT_TOKENS = 100

Json = dict[str, Any]


@router.post("/{model}")
async def create(request: Request, model: str, body: CreateRequest) -> Response:
    """Creates or replaces a cache: computes the states of its content and stores them under a name."""
    service: Service = request.app.state.service
    async with service.models.use(model_of(request, model)) as served:
        served.engine.check_available()
        if body.stream:
            return EventStream(await start_events(request, _progress(service, served, body), BEGIN_SECONDS))
        return JSONResponse(await while_connected(request, _create(service, served, body)))


async def _create(service: Service, model: TenantModel, body: CreateRequest, on_progress: Any = None) -> Json:
    entry = await service.caches.create(
        model,
        body.cache_name,
        body.content(),
        forms=body.requested_forms(),
        given=body.given(),
        overwrite=body.allow_overwrite,
        on_progress=on_progress,
    )
    return made(entry)


def made(entry: Entry) -> Json:
    """The answer to the creation or replacement of a cache."""
    created = entry.version == 1
    answer = {
        "object": "cache.created" if created else "cache.updated",
        "cache_name": entry.name,
        "model": entry.model,
        "version": entry.version,
        "size_mb": _megabytes(entry),
        "ttft_ms": round(entry.ttft_ms, 1),
        "build_ms": round(entry.build_ms, 1),
        "tokens": entry.n_tokens,
        "forms": _forms(entry),
        "expires": iso_time(entry.expires),
        "message": "Binary cache generated successfully",
    }
    if entry.n_tokens < SHORT_PROMPT_TOKENS:
        answer["warning"] = (
            f"The prompt has only {entry.n_tokens} tokens: computing it takes hardly longer than loading it."
        )
    return answer


async def _progress(service: Service, model: TenantModel, body: CreateRequest) -> AsyncGenerator[bytes, None]:
    reports: asyncio.Queue[Json | None] = asyncio.Queue()

    def report(computed: int, total: int) -> None:
        reports.put_nowait({"object": "cache.progress", "computed": computed, "total": total})

    creation = asyncio.ensure_future(_create(service, model, body, report))
    creation.add_done_callback(lambda _: reports.put_nowait(None))
    try:
        while progress := await reports.get():
            yield as_event(progress)
        yield as_event(creation.result())
    finally:
        creation.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait([creation])


@router.get("")
async def list_all(request: Request) -> Json:
    """Lists the caches of all models."""
    service: Service = request.app.state.service
    whose = owner(request)
    totals = service.caches.totals(whose, all_evictions=rank(request) == "admin")
    return await _listed(request, None) | {
        "used_bytes": totals.used,
        "quota_bytes": totals.limit or None,
        "evictions": totals.evictions,
        "responses": len(service.responses.of(whose)),
    }


@router.get("/{model}")
async def list_of_model(request: Request, model: str) -> Json:
    """Lists the caches of one model."""
    return await _listed(request, model_of(request, model).name)


@router.get("/{model}/{name:path}")
async def show(request: Request, model: str, name: str) -> Json:
    """Shows one cache with its content."""
    service: Service = request.app.state.service
    served = model_of(request, model)
    entry = service.caches.look_up(served, name, param="name")
    return _described(request, entry) | _content(entry) | await _prospect(service, served, entry)


@router.patch("/{model}/{name:path}")
async def edit(request: Request, model: str, name: str, body: EditRequest) -> Json:
    """Changes a cache's retention; its version and states stay."""
    service: Service = request.app.state.service
    changing = service.caches.edit(_changed(request, model, name), name, body.given())
    return _described(request, await while_connected(request, changing))


@router.delete("/{model}/{name:path}")
async def delete(request: Request, model: str, name: str) -> Json:
    """Deletes a cache. Running requests that use it are not affected."""
    service: Service = request.app.state.service
    served = _changed(request, model, name)
    await service.caches.delete(served, name)
    return {"object": "cache.deleted", "cache_name": name, "model": served.name, "deleted": True}


def _changed(request: Request, model: str, name: str) -> TenantModel:
    """The model as seen by the owner of the cache to be changed: the request's key, or the public if the key
    has no cache of this name. Raises AdminRequired, ModelNotFound or InvalidName."""
    service: Service = request.app.state.service
    served = model_of(request, model)
    shared = service.caches.public_view(served, name)
    if shared is None:
        return served
    # Not even an admin can delete a declared cache: `delete` refuses it.
    if not service.caches.is_declared(shared, name) or request.method != "DELETE":
        check_admin(request, f"Changing the cache {name!r}, which is everyone's,")
    return shared


async def _prospect(service: Service, model: TenantModel, entry: Entry) -> Json:
    """`would_hit` (a request would start from the state now) and `miss_reason`, null while loading."""
    try:
        miss = await service.caches.miss_reason(model, entry)
    except ModelLoading:
        return {"would_hit": None, "miss_reason": None}
    return {"would_hit": miss is None, "miss_reason": miss}


async def _listed(request: Request, model: str | None) -> Json:
    service: Service = request.app.state.service
    whose = owner(request)
    building = service.caches.building(whose, model)
    return {
        "object": "list",
        "data": [_described(request, entry) for entry in service.caches.visible(whose, model)],
        "building": [{"cache_name": name, "model": model} for model, name in building],
        "store": await store_state(request, model),
    }


def _described(request: Request, entry: Entry) -> Json:
    service: Service = request.app.state.service
    return {
        "object": "cache",
        "cache_name": entry.name,
        "model": entry.model,
        "origin": entry.origin,
        "owner": entry.owner or None,
        "version": entry.version,
        "size_mb": _megabytes(entry),
        "tokens": entry.n_tokens,
        "forms": _forms(entry),
        "evicted": entry.evicted,
        "created": iso_time(entry.created),
        "updated": iso_time(entry.updated),
        **shown(entry, service.caches.expires_at(entry)),
        "build_ms": round(entry.build_ms, 1),
        "unverified": service.caches.is_from_copy(entry),
        **_usage(request, entry),
    }


def _usage(request: Request, entry: Entry) -> Json:
    """Usage figures; null if they would reveal other keys' requests."""
    if rank(request) != "admin" and entry.owner != owner(request):
        return dict.fromkeys(("hits", "last_used", "tokens_saved", "seconds_saved"))
    service: Service = request.app.state.service
    usage = service.caches.usage(entry)
    return {
        "hits": usage.hits,
        "last_used": iso_time(usage.last_used),
        "tokens_saved": usage.tokens_saved,
        "seconds_saved": round(usage.seconds_saved, 3),
    }


def _content(entry: Entry) -> Json:
    """The cache's content and, for a derived cache, its parts."""
    content: Json = {"origin": entry.origin}
    content |= (
        {"messages": entry.messages, "tools": entry.tools} if entry.messages else {"prompt": entry.prompt}
    )
    return content | ({"parts": entry.parts} if entry.parts else {})


def _forms(entry: Entry) -> Json:
    return {
        name: {"tokens": form.n_tokens, "size_mb": round(form.state_bytes / 1e6, 2)}
        for name, form in entry.forms.items()
    }


def _megabytes(entry: Entry) -> float:
    return round(entry.size_bytes / 1e6, 2)
