"""Model and caches of a request, as given by its body, its model's name, its route or its API key."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from fastapi import Request

from headstart.service.interface.options import Options
from headstart.service.models.tenant_model import TenantModel
from headstart.service.service import Service, Target


class Addressed(Protocol):
    """A body that names a model and may name caches."""

    model: str

    @property
    def names(self) -> tuple[str, ...] | None: ...


def admit(request: Request, body: Addressed) -> Target:
    """The body's model for the request's key, and the caches that `use_cache` names; if it is null, the cache
    of the model's name, else of the route, else of the key. Raises ModelNotFound."""
    service: Service = request.app.state.service
    target = service.resolve(body.model, owner(request))
    request.state.requested_model = body.model
    if body.names is not None:
        return replace(target, caches=body.names)
    if target.caches is None and (cache := _default_cache(request)):
        return replace(target, caches=(cache,), is_default=True)
    return target


def _default_cache(request: Request) -> str | None:
    """The cache of the request's route, else of its key."""
    state = request.state
    return getattr(state, "cache", None) or getattr(state, "default_cache", None)


def model_of(request: Request, name: str) -> TenantModel:
    """The model of this name or alias, for the request's key. Raises ModelNotFound."""
    service: Service = request.app.state.service
    request.state.requested_model = name
    return service.model(name, owner(request))


def owner(request: Request) -> str:
    """The name of the request's API key; "" if no keys are configured or the route needs none."""
    return str(getattr(request.state, "owner", ""))


EXPLAIN_HEADER = "x-headstart-explain"


def explaining(request: Request, options: Options) -> Options:
    """The options, with `explain` also if the header requests it."""
    requested = request.headers.get(EXPLAIN_HEADER, "").lower() in ("1", "true")
    return replace(options, explain=options.explain or requested)
