"""/v1/models and /health: list, load and unload models; report the server's state."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field

from headstart.api.auth import check_admin, rank
from headstart.api.context import model_of, owner
from headstart.api.fields.generation import Body
from headstart.api.fields.values import Utf8
from headstart.api.sse import while_connected
from headstart.errors import HeadstartError, ModelLoading, Unavailable
from headstart.service.models.model_names import choices
from headstart.service.models.tenant_model import TenantModel
from headstart.service.service import Service

router = APIRouter()

Json = dict[str, Any]


class LoadRequest(Body):
    model: Utf8 = Field(description="The model's name.")


class UnloadRequest(LoadRequest):
    force: bool = Field(False, description="True: unload it also while it answers requests, which then fail.")


@router.get("/health")
async def health(request: Request) -> Json:
    """200 if every model to be loaded at the start answers; 503 while one loads or can't run. If API keys are
    configured, requests without one get no details."""
    service: Service = request.app.state.service
    who = rank(request)
    states = {name: model.state for name, model in service.models.all.items()}
    report: Json = {} if who == "stranger" else {"models": states}
    if not service.models.ready:
        first = (service.models.all[name].engine.failure for name in service.models.first)
        failed = [failure for failure in first if failure]
        error: HeadstartError = ModelLoading("A model is loading.")
        if failed:
            error = Unavailable("A model can't run." if who == "stranger" else failed[0])
        error.details = report
        raise error
    if who != "stranger":
        whose = None if who == "admin" else owner(request)
        report["caches_building"] = len(service.caches.building(whose))
    return {"status": "ok", **report}


@router.get("/v1/models")
async def list_models(request: Request) -> Json:
    """Lists models, aliases, and `model@cache` for each client or declared cache."""
    service: Service = request.app.state.service
    service.models.rescan()
    visible = service.caches.visible(owner(request))
    caches = [entry for entry in visible if entry.model in service.models.all]
    names = [*service.names(), *choices(caches)]
    return {"object": "list", "data": [_described(service, name) for name in names]}


@router.get("/v1/models/available")
async def available(request: Request) -> Json:
    """Lists all models, loaded or not."""
    service: Service = request.app.state.service
    service.models.rescan()
    return {"object": "list", "data": [_described(service, name) for name in service.models.all]}


@router.get("/v1/models/loaded")
async def loaded(request: Request) -> Json:
    """Lists the loaded models, which answer at once."""
    service: Service = request.app.state.service
    ready = [name for name, model in service.models.all.items() if model.state == "ready"]
    return {"object": "list", "data": [_described(service, name) for name in ready]}


@router.post("/v1/models/load")
async def load(request: Request, body: LoadRequest) -> Json:
    """Loads a model before its first use; answers when it is loaded."""
    service: Service = request.app.state.service
    await while_connected(request, _load(service, model_of(request, body.model)))
    return _described(service, body.model)


async def _load(service: Service, model: TenantModel) -> None:
    async with service.models.use(model) as used:
        used.engine.check_available()


@router.post("/v1/models/unload")
async def unload(request: Request, body: UnloadRequest) -> Json:
    """Unloads a model. Its caches stay; the next request loads it again."""
    check_admin(request, "Unloading a model, which others may be using,")
    service: Service = request.app.state.service
    was_loaded = await service.models.unload(model_of(request, body.model).served, force=body.force)
    return _described(service, body.model) | {"unloaded": was_loaded}


@router.get("/v1/models/{name:path}")
async def show_model(request: Request, name: str) -> Json:
    """Shows one model, alias or `model@cache`."""
    service: Service = request.app.state.service
    target = service.resolve(name, owner(request))
    if "@" in name and target.caches is not None:
        service.caches.look_up(target.model, *target.caches, param="model")
    return _described(service, name)


def _described(service: Service, name: str) -> Json:
    model = service.resolve(name, "").model.served
    answer: Json = {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "headstart",
        "state": model.state,
    }
    if info := model.engine.info:
        answer |= {"n_ctx": info.n_ctx, "slots": info.slots}
    return answer
