"""The ASGI application. The caller loads and closes its service."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from headstart import __version__
from headstart.api import errors
from headstart.api.auth import PAGES, PUBLIC, Keyring, Keys
from headstart.api.dialect import Dialect
from headstart.api.dialects import DIALECTS
from headstart.api.http.bodies import BodyMemory, JsonBodies
from headstart.api.middleware import Faults, PlainPaths, RequestIds, Routes
from headstart.api.openapi import document as reference
from headstart.config.settings import Settings
from headstart.service.service import Service
from headstart.telemetry.metrics import MetricsObserver

DESCRIPTION = """An OpenAI-compatible server that never prefills the same prompt twice. Cache a prompt
once with `POST /v1/cache/{model}`, then start chats and completions from it with `use_cache`. Unknown fields
are accepted."""


def create_app(
    service: Service, dialects: Sequence[Dialect] = DIALECTS, metrics: MetricsObserver | None = None
) -> FastAPI:
    """Serves `dialects`, in this order in /openapi.json. Raises StartupError for an API key that can't be
    read."""
    app: FastAPI = FastAPIOffline(
        title="Headstart",
        version=__version__,
        description=DESCRIPTION,
        redirect_slashes=False,
        redoc_url=None,
        static_url=PAGES,
        # FastAPI's own: its logs have the messages of exceptions, which may quote a request.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.service = service
    app.state.dialects = dialects
    app.state.metrics = metrics or MetricsObserver()
    settings = service.settings
    app.add_middleware(JsonBodies, max_bytes=_bytes(settings.max_body_mb), memory=_body_memory(settings))
    # Middleware runs in reverse order: the last one added sees a request first.
    public = (*PUBLIC, "/metrics") if settings.metrics_public else PUBLIC
    app.add_middleware(Keys, keyring=Keyring(settings), public=public)
    app.add_middleware(Routes, table=settings.routes)
    app.add_middleware(PlainPaths)
    app.add_middleware(Faults)
    app.add_middleware(RequestIds)
    routers = [router for dialect in dialects for router in dialect.routers]
    errors.install(app, routers)
    reference.install(app, dialects)
    for router in routers:
        app.include_router(router)
    return app


def _body_memory(settings: Settings) -> BodyMemory:
    one = _bytes(settings.max_body_mb)
    most = max(_bytes(settings.max_bodies_mb), one)
    return BodyMemory(most, share=max(most // 2, one) if len(settings.keys) > 1 else most)


def _bytes(mebibytes: float) -> int:
    return int(mebibytes * (1 << 20))
