"""/v1/cache/{model}/{name}/file: export and import of cache files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import closing
from typing import Any
from urllib.parse import unquote_to_bytes

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from headstart.api.auth import check_admin
from headstart.api.caches.routes import made
from headstart.api.context import model_of
from headstart.api.sse import ClientLeft
from headstart.names import check_name
from headstart.service.caching.transfer import Exported
from headstart.service.service import Service

router = APIRouter(prefix="/v1/cache")

READ_BYTES = 1 << 20
MEDIA_TYPE = "application/octet-stream"


@router.get("/{model}/{name}/file")
async def export(request: Request, model: str, name: str) -> Response:
    """Exports the current cache file."""
    service: Service = request.app.state.service
    exported = await service.caches.export(model_of(request, model), _name(request, name))
    tag = f'"{exported.digest}"'
    if tag in request.headers.get("if-none-match", ""):
        exported.file.close()
        return Response(status_code=304, headers={"etag": tag})
    headers = {
        "content-length": str(exported.size),
        "content-disposition": f'attachment; filename="{name}.headstart"',
        "etag": tag,
        "cache-control": "no-cache",
    }
    return Sent(exported, headers)


class Sent(StreamingResponse):
    """Sends an open file and closes it at the end, also if the client disconnects before the first byte."""

    def __init__(self, exported: Exported, headers: dict[str, str]) -> None:
        super().__init__(_pieces(exported), headers=headers, media_type=MEDIA_TYPE)
        self.file = exported.file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with closing(self.file):
            await super().__call__(scope, receive, send)


async def _pieces(exported: Exported) -> AsyncGenerator[bytes, None]:
    while piece := await asyncio.to_thread(exported.file.read, READ_BYTES):
        yield piece


@router.put("/{model}/{name}/file")
async def import_file(
    request: Request, model: str, name: str, rebuild: bool = False, allow_overwrite: bool = True
) -> dict[str, Any]:
    """Imports a file that this or another server exported."""
    service: Service = request.app.state.service
    if not rebuild:
        # The engine loads states unchecked: a forged one may crash it, which fails all clients' requests.
        check_admin(request, "Importing states (a cache's text alone is imported with ?rebuild=true)")
    declared = request.headers.get("content-length", "")
    async with service.models.use(model_of(request, model)) as served:
        served.engine.check_available()
        entry = await service.caches.import_file(
            served,
            _name(request, name),
            _body(request),
            size=int(declared) if declared.isdecimal() else None,
            overwrite=allow_overwrite,
            rebuild=rebuild,
        )
    return made(entry)


async def _body(request: Request) -> AsyncIterator[bytes]:
    """The pieces of the request's body. Raises ClientLeft."""
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect:
        raise ClientLeft("The client left.") from None


def _name(request: Request, name: str) -> str:
    """The cache's name. Raises InvalidName, also for an encoded slash: `x%2Ffile` is the name "x/file"."""
    last = request.scope.get("raw_path", b"").rpartition(b"/")[2]
    return check_name(name if unquote_to_bytes(last) == b"file" else f"{name}/file", param="name")
