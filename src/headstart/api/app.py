"""The ASGI application over a service that someone else loads and closes."""

from __future__ import annotations

from fastapi import FastAPI

from headstart import __version__
from headstart.api import cache_files, caches, completions, errors, messages, models, verify
from headstart.api.keys import Keyring, Keys
from headstart.api.middleware import Faults, JsonBodies, PlainPaths, RequestIds
from headstart.api.routes import Routes
from headstart.service.server import Service


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
    for part in (completions, messages, models, cache_files, caches, verify):
        app.include_router(part.router)
    return app
