"""uvicorn's server, with an order of its own for the end."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, cast

import uvicorn

from headstart.api.http.connection import Connection
from headstart.api.http.limits import Patience
from headstart.config.settings import Settings

log = logging.getLogger(__name__)

# How long requests that are ended have to tell so.
END_SECONDS = 1.0
# A loop that stood still says nothing about clients.
MOST_TICKED = 2.0


class HttpConfig(uvicorn.Config):
    """Signals, lifespan and logging are the caller's."""

    def __init__(self, app: Any, settings: Settings) -> None:
        super().__init__(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            proxy_headers=False,
            access_log=False,
            log_config=None,
            timeout_keep_alive=cast(int, settings.keep_alive_seconds),
            timeout_graceful_shutdown=settings.drain_seconds,
        )
        self.patience = Patience(
            connections=settings.max_connections,
            head=settings.head_seconds,
            body=settings.body_seconds,
            send=settings.send_seconds,
        )


class HttpServer(uvicorn.Server):
    """`serve` returns when it was told to stop, and every request has its end."""

    def __init__(self, config: HttpConfig) -> None:
        super().__init__(config)
        self._ticked = monotonic()

    def stop(self) -> None:
        """Requests that run may end till `drain_seconds` are over; when told a second time, no longer."""
        self.force_exit = self.should_exit
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @property
    def _connections(self) -> list[Connection]:
        return list(cast("set[Connection]", self.server_state.connections))

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self._tick()
        return await super().on_tick(counter)

    def _tick(self) -> None:
        now = monotonic()
        seconds, self._ticked = min(now - self._ticked, MOST_TICKED), now
        for connection in self._connections:
            connection.tick(seconds)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in self._connections:
            connection.shutdown()
        await self._drained()
        tasks = list(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            log.warning("%d requests were ended before their time", len(tasks))
        await self._settled(lambda: not (self.server_state.tasks or self._connections), END_SECONDS)
        for connection in self._connections:
            connection.abort()

    async def _drained(self) -> None:
        """Nothing runs and nothing is left to be sent, or it may take no longer."""

        def is_drained() -> bool:
            sending = any(connection.is_sending for connection in self._connections)
            return self.force_exit or not (self.server_state.tasks or sending)

        await self._settled(is_drained, cast(int, self.config.timeout_graceful_shutdown))

    async def _settled(self, is_so: Callable[[], bool], seconds: float) -> None:
        """Waits until it is so, but no longer than `seconds`."""
        deadline = monotonic() + seconds
        while not is_so() and monotonic() < deadline:
            await asyncio.sleep(0.05)
            if monotonic() - self._ticked >= 1:
                self._tick()
