"""Requests that say by their path, or by their model's name, which cache they start from."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from fastapi import Request

from headstart.service.interface.options import Options
from headstart.service.models.model import ServedModel
from headstart.service.service import Service


class Addressed(Protocol):
    """A body that names a model, and may name caches."""

    model: str
    use_cache: str | list[str] | None


def addressed(request: Request, body: Addressed) -> ServedModel:
    """The model that the body names, as the request's key sees it. Where the body names no cache itself, the
    one of its model's name is filled in, else the one of the route, else of the key. Raises ModelNotFound."""
    service: Service = request.app.state.service
    model, cache = service.target(body.model)
    if body.use_cache is None:
        state = request.state
        by_address = getattr(state, "cache", None) or getattr(state, "default_cache", None)
        body.use_cache = by_address if cache is None else cache
    return seen(request, model)


def owner(request: Request) -> str:
    """The name of the request's key; "" where none is needed."""
    return str(getattr(request.state, "owner", ""))


def seen(request: Request, model: ServedModel) -> ServedModel:
    """The model with the caches that the request's key may use."""
    return model.seen_by(owner(request))


EXPLAIN_HEADER = "x-headstart-explain"


def explaining(request: Request, options: Options) -> Options:
    """The explanation may be asked for by a header as well."""
    asked = request.headers.get(EXPLAIN_HEADER, "").lower() in ("1", "true")
    return replace(options, explain=options.explain or asked)
