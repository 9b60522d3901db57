"""Middleware: applied to every request before routing."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headstart.api import errors
from headstart.api.dialect import requested_dialect
from headstart.errors import HeadstartError, InvalidName, ShuttingDown

log = logging.getLogger(__name__)


class RequestIds:
    """Sets x-request-id on every reply, and the dialect's own header: the client's id, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if 0 < len(given) <= 128 and given.isprintable() else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                dialect = requested_dialect(scope)
                if dialect and dialect.request_id_header:
                    headers[dialect.request_id_header] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


class Faults:
    """Answers unexpected exceptions with an error in the standard format and logs them; likewise requests
    that the server's shutdown cancels, and requests whose body never arrived in full."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except asyncio.CancelledError:
            # Requests are cancelled only at the server's shutdown.
            if started:
                raise
            await errors.response(ShuttingDown())(scope, receive, send)
        except HeadstartError as error:
            if started:
                raise
            await errors.response(error)(scope, receive, send)
        except Exception:
            log.exception("%s %s failed", scope.get("method"), scope.get("path"))
            if started:
                raise
            fault = HeadstartError("An unexpected error in the server; its log has details.")
            await errors.response(fault)(scope, receive, send)


class PlainPaths:
    """Refuses paths with control characters: a route would match a path despite a line break at its end."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["path"].isprintable():
            error = InvalidName("The address has characters that can't be printed.", param="name")
            await errors.response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)


# A route's prefix may precede this path.
API = b"/v1/"


class Routes:
    """`table` maps path prefixes to caches. /prefix/v1/... is answered like /v1/..., from that cache."""

    def __init__(self, app: ASGIApp, table: Mapping[str, str]) -> None:
        self.app = app
        # Longest first: one prefix may begin with another.
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
