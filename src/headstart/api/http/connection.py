"""uvicorn's HTTP/1.1 with limits that apply before the client is authenticated."""

from __future__ import annotations

import asyncio
import select
from typing import Any, Literal, cast

import httptools
import uvicorn
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from headstart.api.http import limits
from headstart.api.http.exchange import Exchange
from headstart.api.http.refusals import refusal
from headstart.api.http.request_head import RequestHead
from headstart.errors import BadRequest, HeadstartError, Overloaded, RequestTimeout, ShuttingDown


class Connection(HttpToolsProtocol):
    """Call `tick` about once a second. Exchanges write to the connection as to a transport; when one calls
    `close`, the client may finish sending."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.patience: limits.Patience = cast(Any, config).patience
        # The part that the parser is in; None: between two requests.
        self._part: Literal["head", "body"] | None = None
        self._head = RequestHead()
        self._body_bytes = 0
        self._chunking_bytes = 0
        self._written = 0
        # The answer to unreadable data, to be sent after the pending answers.
        self._refusal: HeadstartError | None = None
        # Incoming data is discarded.
        self._is_deaf = False
        self._is_lingering = False
        self._discarded = 0
        self._running: Exchange | None = None
        # Seconds, counted by ticks: waiting for the client, and without data from it.
        self._waited = 0.0
        self._waits_since = self.loop.time()
        self._silent = 0.0
        # The pace at which the client sends a body, and reads an answer.
        self._unsent = limits.Pace(self.patience.body)
        self._unread = limits.Pace(self.patience.send)
        self._since = self.loop.time()

    @property
    def is_idle(self) -> bool:
        """Whether no request is between the end of its headers and the end of its answer."""
        return self._running is None or self._running.response_complete

    @property
    def idle_since(self) -> float:
        return self._since

    @property
    def is_sending(self) -> bool:
        return self.transport.get_write_buffer_size() > 0

    # From the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.patience.connections and not self._another_gives_way():
            self._is_deaf = True
            self.write(refusal(Overloaded("The server has as many connections as it may have."), ""))
            transport.close()

    def _another_gives_way(self) -> bool:
        others = cast("set[Connection]", self.connections) - {self}
        idle = [other for other in others if other.is_idle and not other.transport.is_closing()]
        if idle:
            min(idle, key=lambda other: other.idle_since).abort()
        return bool(idle)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._is_deaf:
            self._discard(data)
            return
        part, body_bytes = self._part, self._body_bytes
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The upgrade is ignored: the request is answered, later data in the other protocol is not read.
            self._is_deaf = True
        except httptools.HttpParserError as error:
            known = error.__context__
            self._refuse(
                known if isinstance(known, HeadstartError) else BadRequest("This is no HTTP request.")
            )
        else:
            self._count(part, len(data), self._body_bytes - body_bytes)

    def _count(self, part: str | None, received: int, of_body: int) -> None:
        if self._part == "head":
            try:
                self._head.count_bytes(received)
            except HeadstartError as error:
                self._refuse(error)
        elif self._part == part == "body":
            self._chunking_bytes += received - of_body
            if self._chunking_bytes > limits.MAX_CHUNKING_BYTES + self._body_bytes:
                self._refuse(BadRequest("The body's chunks are too small for what is around them."))

    def _discard(self, data: bytes) -> None:
        self._silent = 0.0
        self._discarded += len(data)
        if self._discarded > limits.LINGER_BYTES:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        self.pipeline.clear()
        if self._running and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    # From the parser. Errors raised here become the answer.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._part = "head"
        self._head = RequestHead()
        self.scope["headers"] = self._head.headers
        self._waited = 0.0
        self._waits_since = self.loop.time()

    def on_url(self, url: bytes) -> None:
        self._head.add_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers after the last chunk are ignored: the request was checked without them.
        if self._part == "head":
            self._head.add_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= limits.MAX_PIPELINED:
            raise BadRequest(
                f"More than {limits.MAX_PIPELINED} requests wait for answers on this connection."
            )
        upgrades = self.parser.should_upgrade()
        if upgrades and self._head.has_body:
            raise BadRequest("Upgrades are not supported: send the request without the Upgrade header.")
        self.scope.update(self._head.target())  # type: ignore[typeddict-item]
        self.scope["method"] = self.parser.get_method().decode("ascii")
        self.scope["http_version"] = self.parser.get_http_version()
        self.cycle = self._new_exchange(keep_alive=not upgrades and self.parser.should_keep_alive())
        self._part = "body"
        self._body_bytes = self._chunking_bytes = 0
        self._unsent = limits.Pace(self.patience.body)
        if self.is_idle:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def _new_exchange(self, *, keep_alive: bool) -> Exchange:
        return Exchange(
            scope=self.scope,
            transport=self,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=(b"expect", b"100-continue") in self._head.headers,
            keep_alive=keep_alive and self.scope["http_version"] != "1.0",
            on_response=self.on_response_complete,
        )

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._part = None
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cast(Exchange, cycle)
        super()._start_asgi_task(cycle, app)

    # From exchanges

    def write(self, data: bytes) -> None:
        self._written += len(data)
        self.transport.write(data)

    def is_closing(self) -> bool:
        return self._is_lingering or self.transport.is_closing()

    def abort(self) -> None:
        self.transport.abort()

    def close(self) -> None:
        """Closes the connection once the client has read the answer and finished sending."""
        self.pipeline.clear()
        self._linger()

    def _linger(self) -> None:
        """Discards input for a while: closing while bytes arrive resets the connection, losing the answer."""
        if not self.is_closing():
            self._is_deaf = self._is_lingering = True
            self._waited = self._silent = 0.0
            self.transport.write_eof()
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        if self._is_lingering:
            self.server_state.total_requests += 1
            return
        super().on_response_complete()
        if self._refusal and self.is_idle:
            self._send_refusal(self._refusal)

    # Limits

    def _refuse(self, error: HeadstartError) -> None:
        """Answers unreadable data with an error and discards what follows."""
        self._is_deaf = True
        if self._part == "body":
            cast(Exchange, self.cycle).fail(error)
        elif self.is_idle:
            self._send_refusal(error)
        else:
            self._refusal = error

    def _send_refusal(self, error: HeadstartError) -> None:
        self.write(refusal(error, self._head.path))
        self._linger()

    def tick(self, seconds: float) -> None:
        """Applies the time limits after `seconds` more have passed."""
        if self.is_sending:
            if self._unread.behind(seconds, self._written - self.transport.get_write_buffer_size()):
                self.abort()
        elif self._is_lingering:
            self._waited += seconds
            self._silent += seconds
            if self._silent > limits.LINGER_SILENT_SECONDS or self._waited > limits.LINGER_SECONDS:
                self.abort()
        elif not self.is_idle:
            self._wait_for_body(seconds)
        elif self._part == "head" or self._running is None:
            self._wait_for_head(seconds)

    def _wait_for_body(self, seconds: float) -> None:
        # Counts only while the application waits for the body: before 100 Continue the client may wait, too.
        waits = self._running and self._running.is_receiving and self._running.more_body
        if waits and not self._is_deaf and self._unsent.behind(seconds, self._body_bytes):
            self._refuse(RequestTimeout("The request's body came too slowly."))

    def _wait_for_head(self, seconds: float) -> None:
        self._waited += min(seconds, self.loop.time() - self._waits_since)
        if self._waited > self.patience.head and not self._has_unread():
            if self._part is None:
                self.transport.close()
            else:
                self._refuse(RequestTimeout("The request's headers came too slowly."))

    def timeout_keep_alive_handler(self) -> None:
        if not self._has_unread():
            super().timeout_keep_alive_handler()

    def _has_unread(self) -> bool:
        """Whether data has arrived that a busy event loop has not read yet. The client isn't late then, and
        closing would reset the connection."""
        if self.transport.is_closing():
            return False
        arrived = select.poll()
        arrived.register(self.transport.get_extra_info("socket"), select.POLLIN)
        return bool(arrived.poll(0))

    def shutdown(self) -> None:
        """For the server's shutdown: ends incomplete requests at once; complete ones may finish."""
        self.pipeline.clear()
        self._is_deaf = True
        if self._running is None or self._running.response_complete:
            self.transport.close()
        elif self._running.more_body:
            self._running.fail(ShuttingDown())
        else:
            self._running.keep_alive = False
