"""Request bodies: read within limits, measured as they arrive; large ones are parsed one at a time."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headstart.api import errors
from headstart.errors import BadRequest, BodyTooLarge, HeadstartError, Overloaded
from headstart.json_scan import JsonScan

# Thresholds above which parsing takes so long that other requests should not wait for several bodies.
LARGE_BYTES = 1 << 20
LARGE_COUNT = 20_000
LARGE_VALUES = 100_000
# A body that is large or has too many values waits this long, so that requests arriving meanwhile go first.
PATIENCE_SECONDS = 0.1


class BodyMemory:
    """Limits the bytes of the bodies of all requests in progress: `most` in all, `share` for one owner."""

    def __init__(self, most: int, share: int) -> None:
        self.most = most
        self.share = share
        self._reserved: Counter[str] = Counter()

    @contextmanager
    def of(self, owner: str) -> Iterator[BodyReservation]:
        reservation = BodyReservation(self, owner)
        try:
            yield reservation
        finally:
            reservation.release()

    def reserve(self, owner: str, size: int) -> None:
        """Raises Overloaded."""
        if self._reserved[owner] + size > self.share or self._reserved.total() + size > self.most:
            raise Overloaded("The bodies of requests in progress have reached their memory limit.")
        self._reserved[owner] += size

    def release(self, owner: str, size: int) -> None:
        self._reserved[owner] -= size


class BodyReservation:
    """The bytes reserved for one request's body."""

    def __init__(self, memory: BodyMemory, owner: str) -> None:
        self.memory = memory
        self.owner = owner
        self.size = 0

    def grow(self, size: int) -> None:
        """Raises Overloaded."""
        self.memory.reserve(self.owner, size)
        self.size += size

    def release(self) -> None:
        size, self.size = self.size, 0
        self.memory.release(self.owner, size)


class TenantTurns:
    """Serialises the parsing of large bodies. After each, the event loop is left to other work for as long as
    the parsing took."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def begin(self) -> None:
        """Waits for a turn. It lasts until the caller next yields to the event loop."""
        await asyncio.sleep(PATIENCE_SECONDS)
        await self._lock.acquire()
        asyncio.get_running_loop().call_soon(self._ended, monotonic())

    def _ended(self, began: float) -> None:
        asyncio.get_running_loop().call_later(monotonic() - began, self._lock.release)


class Body:
    """A body that arrives in pieces. Once it exceeds the limits of JSON, its bytes are dropped."""

    def __init__(self, max_bytes: int, reservation: BodyReservation) -> None:
        self.max_bytes = max_bytes
        self.reservation = reservation
        self.size = 0
        self.fault: BadRequest | None = None
        self._scan = JsonScan()
        self._pieces: list[bytes] = []

    @property
    def is_large(self) -> bool:
        scan = self._scan
        many = scan.strings + scan.containers > LARGE_COUNT or scan.values > LARGE_VALUES
        return self.size > LARGE_BYTES or many

    def add(self, piece: bytes) -> None:
        """Raises BodyTooLarge or Overloaded."""
        self.size += len(piece)
        if self.size > self.max_bytes:
            raise BodyTooLarge(f"The body is larger than {self.max_bytes} bytes.")
        if self.fault:
            return
        self.reservation.grow(len(piece))
        try:
            self._scan.feed(piece)
            self._pieces.append(piece)
        except ValueError as error:
            self.fault = BadRequest(f"The body {error}.")
            self._pieces.clear()
            self.reservation.release()

    def whole(self) -> bytes:
        """Raises BadRequest."""
        if self.fault:
            raise self.fault
        body = b"".join(self._pieces)
        if json.detect_encoding(body) not in ("utf-8", "utf-8-sig"):
            raise BadRequest("The body is not JSON in UTF-8.")
        self._pieces.clear()
        return body


class JsonBodies:
    """Reads bodies up to a limit, except files, and treats them as JSON whatever their content type, because
    `curl -d` labels everything a form. A page in a browser can send forms to any server without a preflight
    request, so a request with an Origin must itself declare JSON."""

    def __init__(self, app: ASGIApp, max_bytes: int, memory: BodyMemory) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.memory = memory
        self.turns = TenantTurns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS") or _is_file(scope):
            await self.app(scope, receive, send)
            return
        with self.memory.of(scope.get("state", {}).get("owner", "")) as reservation:
            body = Body(self.max_bytes, reservation)
            try:
                content = await _read(body, Headers(scope=scope), receive)
            except ClientDisconnect:
                return
            except HeadstartError as error:
                await errors.response(error)(scope, receive, send)
                return
            await self.app(scope, self._replaying(content, body, scope, receive), send)

    def _replaying(self, content: bytes, body: Body, scope: Scope, receive: Receive) -> Receive:
        headers = MutableHeaders(scope=scope)
        if "origin" not in headers:
            headers["content-type"] = "application/json"
        unread = [content]

        async def replay() -> Message:
            if not unread:
                return await receive()
            if body.is_large:
                await self.turns.begin()
            return {"type": "http.request", "body": unread.pop(), "more_body": False}

        return replay


async def _read(body: Body, headers: Headers, receive: Receive) -> bytes:
    """The body. Raises ClientDisconnect if its end never arrives, BadRequest, BodyTooLarge or Overloaded."""
    declared = headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > body.max_bytes:
        raise BodyTooLarge(f"The body is larger than {body.max_bytes} bytes.")
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body.add(message.get("body", b""))
        if not message.get("more_body"):
            break
    if body.fault:
        await asyncio.sleep(PATIENCE_SECONDS)
    return body.whole()


def _is_file(scope: Scope) -> bool:
    """Whether the handler reads the body itself. No Origin check is needed: browsers preflight a PUT."""
    return bool(scope["method"] == "PUT" and scope["path"].endswith("/file"))
