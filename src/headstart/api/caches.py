"""/v1/cache: create, list, show and delete named caches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from headstart.api.keys import owner, seen
from headstart.api.schemas import CacheRequest
from headstart.api.streaming import BEGIN_SECONDS, EventStream, as_event, begun, while_connected
from headstart.caches.entry import Content, Entry
from headstart.service.model import ServedModel
from headstart.service.server import Service

router = APIRouter(prefix="/v1/cache")

SHORT_PROMPT_TOKENS = 100

Json = dict[str, Any]


@router.post("/{model}")
async def create(request: Request, model: str, body: CacheRequest) -> Response:
    """Computes the states of a prompt and keeps them under a name."""
    service: Service = request.app.state.service
    served = seen(request, service.model(model))
    served.engine.check_available()
    if body.stream:
        return EventStream(await begun(request, _progress(service, served, body), BEGIN_SECONDS))
    return JSONResponse(await while_connected(request, _create(service, served, body)))


async def _create(service: Service, model: ServedModel, body: CacheRequest, on_progress: Any = None) -> Json:
    entry = await service.caching.create(
        model,
        body.cache_name,
        Content(body.prompt),
        forms=tuple(dict.fromkeys(body.forms)),
        overwrite=body.allow_overwrite,
        on_progress=on_progress,
    )
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
        "message": "Binary cache generated successfully",
    }
    if entry.n_tokens < SHORT_PROMPT_TOKENS:
        answer["warning"] = (
            f"The prompt has only {entry.n_tokens} tokens: computing it takes hardly longer than loading it."
        )
    return answer


async def _progress(service: Service, model: ServedModel, body: CacheRequest) -> AsyncGenerator[bytes, None]:
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
    """The caches of all models."""
    service: Service = request.app.state.service
    return _listed(service, owner(request), None)


@router.get("/{model}")
async def list_of_model(request: Request, model: str) -> Json:
    """The caches of one model."""
    service: Service = request.app.state.service
    return _listed(service, owner(request), service.model(model).name)


@router.get("/{model}/{name:path}")
async def show(request: Request, model: str, name: str) -> Json:
    """One cache, with its prompt."""
    service: Service = request.app.state.service
    served = seen(request, service.model(model))
    entry = service.caching.look_up(served, name, param="name")
    return _described(service, entry) | {"prompt": entry.prompt}


@router.delete("/{model}/{name:path}")
async def delete(request: Request, model: str, name: str) -> Json:
    """Forgets a cache. Requests that have begun with it end with it."""
    service: Service = request.app.state.service
    served = seen(request, service.model(model))
    service.caching.delete(served, name)
    return {"object": "cache.deleted", "cache_name": name, "model": served.name, "deleted": True}


def _listed(service: Service, whose: str, model: str | None) -> Json:
    building = service.caching.building(whose, model)
    return {
        "object": "list",
        "data": [_described(service, entry) for entry in service.caching.visible(whose, model)],
        "building": [{"cache_name": name, "model": model} for model, name in building],
    }


def _described(service: Service, entry: Entry) -> Json:
    usage = service.store.usage(entry)
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
        "created": _time(entry.created),
        "updated": _time(entry.updated),
        "build_ms": round(entry.build_ms, 1),
        "hits": usage.hits,
        "last_used": _time(usage.last_used),
    }


def _forms(entry: Entry) -> Json:
    return {
        name: {"tokens": form.n_tokens, "size_mb": round(form.state_bytes / 1e6, 2)}
        for name, form in entry.forms.items()
    }


def _megabytes(entry: Entry) -> float:
    return round(entry.size_bytes / 1e6, 2)


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
