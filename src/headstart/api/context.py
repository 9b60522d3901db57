"""Model and cache of a request, as given by its body, its model's name, its route or its API key."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from fastapi import Request

from headstart.service.interface.options import Options
from headstart.service.models.model import ServedModel
from headstart.service.service import Service


class Addressed(Protocol):
    """A body that names a model and may name caches."""

    model: str
    use_cache: str | list[str] | None


def addressed(request: Request, body: Addressed) -> ServedModel:
    """The body's model as the request's key sees it. If `use_cache` is null, sets it to the cache of the
    model's name, else of the route, else of the key. Raises ModelNotFound."""
    service: Service = request.app.state.service
    model, cache = service.target(body.model)
    if body.use_cache is None:
        state = request.state
        by_address = getattr(state, "cache", None) or getattr(state, "default_cache", None)
        body.use_cache = by_address if cache is None else cache
    return seen(request, model)


def owner(request: Request) -> str:
    """The name of the request's API key; "" if no keys are configured or the route needs none."""
    return str(getattr(request.state, "owner", ""))


def seen(request: Request, model: ServedModel) -> ServedModel:
    """The model, restricted to the caches that the request's key may use."""
    return model.seen_by(owner(request))


EXPLAIN_HEADER = "x-headstart-explain"


def explaining(request: Request, options: Options) -> Options:
    """The options, with `explain` also if the header requests it."""
    asked = request.headers.get(EXPLAIN_HEADER, "").lower() in ("1", "true")
    return replace(options, explain=options.explain or asked)
