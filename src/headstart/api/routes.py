"""Requests that say by their path, or by their model's name, which cache they start from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from headstart.api.keys import seen
from headstart.service.models.model import ServedModel
from headstart.service.service import Service

# What a route may be put before.
API = b"/v1/"


class Routes:
    """`table`: prefixes, each with a cache. /prefix/v1/... is answered as /v1/... is, from this cache."""

    def __init__(self, app: ASGIApp, table: Mapping[str, str]) -> None:
        self.app = app
        # The longest first: one may begin as another does.
        self.table = sorted(table.items(), key=lambda route: -len(route[0]))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            for prefix, cache in self.table:
                if path.startswith(prefix + "/v1/"):
                    scope["path"] = path[len(prefix) :]
                    scope["raw_path"] = API + scope["raw_path"].partition(API)[2]
                    scope.setdefault("state", {})["cache"] = cache
                    break
        await self.app(scope, receive, send)


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
