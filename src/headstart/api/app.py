"""The ASGI application over a service that someone else loads and closes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request

from headstart import __version__
from headstart.api import cache_files, caches, completions, errors, verify
from headstart.api.keys import Keyring, Keys, owner, seen
from headstart.api.middleware import Faults, JsonBodies, PlainPaths, RequestIds
from headstart.api.routes import Routes
from headstart.errors import HeadstartError, ModelLoading, Unavailable
from headstart.service.routes import choices
from headstart.service.server import Service

router = APIRouter()


def create_app(service: Service) -> FastAPI:
    """Raises StartupError for an API key that can't be read."""
    app = FastAPI(title="Headstart", version=__version__, redirect_slashes=False)
    app.state.service = service
    app.add_middleware(JsonBodies, max_bytes=int(service.settings.max_body_mb * (1 << 20)))
    app.add_middleware(Routes, table=service.settings.routes)
    app.add_middleware(Keys, keyring=Keyring(service.settings))
    app.add_middleware(PlainPaths)
    app.add_middleware(Faults)
    app.add_middleware(RequestIds)
    errors.install(app)
    for part in (completions.router, router, cache_files.router, caches.router, verify.router):
        app.include_router(part)
    return app


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """200 when every model answers; 503 while one loads or can't run."""
    service: Service = request.app.state.service
    states = {name: model.engine.state for name, model in service.models.items()}
    if not service.ready:
        failed = [model.engine.failure for model in service.models.values() if model.engine.failure]
        error: HeadstartError = Unavailable(failed[0]) if failed else ModelLoading("A model is loading.")
        error.details = {"models": states}
        raise error
    return {"status": "ok", "models": states, "caches_building": service.caching.n_building}


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    caches = [entry for entry in service.shelves.visible(owner(request)) if entry.model in service.models]
    names = [*service.names(), *choices(caches)]
    return {"object": "list", "data": [_model(service, name) for name in names]}


@router.get("/v1/models/{name:path}")
async def show_model(request: Request, name: str) -> dict[str, Any]:
    service: Service = request.app.state.service
    model, cache = service.target(name)
    if "@" in name and cache is not None:
        service.shelves.look_up(seen(request, model), cache, param="model")
    return _model(service, name)


def _model(service: Service, name: str) -> dict[str, Any]:
    model, _ = service.target(name)
    answer: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "headstart",
    }
    if info := model.engine.info:
        answer |= {"n_ctx": info.n_ctx, "slots": info.slots}
    return answer
