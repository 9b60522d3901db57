"""uvicorn's server, with its own shutdown sequence."""

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

# Time for cancelled requests to send their error.
END_SECONDS = 1.0
# The longest time counted per tick: a blocked event loop says nothing about clients.
MOST_TICKED = 2.0


class HttpConfig(uvicorn.Config):
    """Leaves signals, lifespan and logging to the caller."""

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
    """`serve` returns after `stop` was called and every request has ended."""

    def __init__(self, config: HttpConfig) -> None:
        super().__init__(config)
        self._ticked = monotonic()

    def stop(self) -> None:
        """Lets running requests finish within `drain_seconds`; a second call ends them at once."""
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
            log.warning("%d requests were cancelled by the shutdown", len(tasks))
        await self._settled(lambda: not (self.server_state.tasks or self._connections), END_SECONDS)
        for connection in self._connections:
            connection.abort()

    async def _drained(self) -> None:
        """Waits until nothing runs and nothing is left to send, or the time is over."""

        def is_drained() -> bool:
            sending = any(connection.is_sending for connection in self._connections)
            return self.force_exit or not (self.server_state.tasks or sending)

        await self._settled(is_drained, cast(int, self.config.timeout_graceful_shutdown))

    async def _settled(self, is_so: Callable[[], bool], seconds: float) -> None:
        """Waits until `is_so()`, at most `seconds`."""
        deadline = monotonic() + seconds
        while not is_so() and monotonic() < deadline:
            await asyncio.sleep(0.05)
            if monotonic() - self._ticked >= 1:
                self._tick()
