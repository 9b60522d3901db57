"""One request and its answer on a connection."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from uvicorn._types import ASGI3Application, ASGIReceiveEvent, ASGISendEvent
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from headstart.errors import HeadstartError


class Exchange(RequestResponseCycle):
    """uvicorn's cycle, writing to the connection instead of its transport. An answer sent before the end of
    the request announces that the connection will be closed."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.failure: HeadstartError | None = None
        # Whether the application waits for data from the client.
        self.is_receiving = False

    @property
    def is_running(self) -> bool:
        return not self.response_complete

    def fail(self, error: HeadstartError) -> None:
        """The rest of the body won't arrive: makes `receive` raise the error instead."""
        self.failure = error
        self.message_event.set()

    async def run_asgi(self, app: ASGI3Application) -> None:
        """Suppresses exceptions: `api/middleware.py` has already answered or logged them."""
        try:
            with suppress(Exception, asyncio.CancelledError):
                await app(self.scope, self.receive, self.send)
            if not (self.response_complete or self.disconnected):
                self.transport.abort()
        finally:
            self.on_response = _nothing

    async def receive(self) -> ASGIReceiveEvent:
        """Raises the error given to `fail`."""
        self.is_receiving = True
        try:
            message = await super().receive()
        finally:
            self.is_receiving = False
        if self.failure is not None and message["type"] == "http.request":
            raise self.failure
        return message

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start" and self.more_body:
            self.keep_alive = False
        await super().send(message)


def _nothing() -> None:
    pass
