"""What happens to every request before it is routed."""

from __future__ import annotations

import logging
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headstart.api import errors
from headstart.errors import BodyTooLarge, HeadstartError, InvalidName

log = logging.getLogger(__name__)


class RequestIds:
    """Gives every reply an x-request-id: the client's own, or a new one."""

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
                if errors.is_anthropic(scope["path"]):
                    headers["request-id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


class Faults:
    """Answers what no handler expected with the one error shape; the log says what it was."""

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
        except Exception:
            log.exception("%s %s failed", scope.get("method"), scope.get("path"))
            if started:
                raise
            fault = HeadstartError("Something went wrong inside the server; its log says what.")
            await errors.response(fault)(scope, receive, send)


class PlainPaths:
    """Refuses addresses with control characters: a route would match as if a line break at the end were not
    there."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["path"].isprintable():
            error = InvalidName("The address has characters that can't be printed.", param="name")
            await errors.response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)


class JsonBodies:
    """Reads bodies up to a limit, but for files, and takes them for JSON whatever their content type says:
    `curl -d` calls everything a form. A page in a browser can send forms to any address without being asked,
    so what carries an Origin must say JSON itself."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS") or _is_file(scope):
            await self.app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        try:
            body = await self._read(headers, receive)
        except ClientDisconnect:
            return
        if body is None:
            error = BodyTooLarge(f"The body is larger than {self.max_bytes} bytes.")
            await errors.response(error, {"connection": "close"})(scope, receive, send)
            return
        if "origin" not in headers:
            headers["content-type"] = "application/json"
        unread = [body]

        async def replay() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        await self.app(scope, replay, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body; None when it is too large. Raises ClientDisconnect when its end never comes."""
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            return None
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                return None
            if not message.get("more_body"):
                return bytes(body)


def _is_file(scope: Scope) -> bool:
    """Whether the body is read by its handler, piece by piece. Browsers ask before they send a PUT."""
    return bool(scope["method"] == "PUT" and scope["path"].endswith("/file"))
