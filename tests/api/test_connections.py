"""Limits on connections, headers and bodies that hold before it is known who asks."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from select import select
from typing import cast

import psutil
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.server import ServerState

from conftest import StartServer
from headstart.api.http.connection import Connection
from headstart.api.http.server import HttpConfig
from headstart.config.settings import Settings
from raw_http import PATIENCE, answer, ask, connect, head, post, received
from servers import RunningServer, eventually, running_server

CHAT = "/v1/chat/completions"
GOOD = json.dumps({"model": "toy", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}).encode()
QUICK = {"HEADSTART_HEAD_SECONDS": "1", "HEADSTART_BODY_SECONDS": "1", "HEADSTART_SEND_SECONDS": "1"}
# A hundredth of what the attacks send, or would make a server keep.
LITTLE = 60 << 20


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory: Path = tmp_path_factory.mktemp("strict") / "cache"
    with running_server(directory, "--model", "toy=toy:", env=QUICK) as server:
        yield server


def _memory(server: RunningServer) -> int:
    return int(psutil.Process(server.process.pid).memory_info().rss)


def _is_served(server: RunningServer) -> bool:
    return server.http.post(CHAT, content=GOOD).status_code == 200


ENDLESS = {
    "one header of 100 MB": (head("GET", "/health")[:-2] + b"x-a: " + b"a" * (100 << 20), 431),
    "5,000 headers": (head("GET", "/health", *["x-a: 1"] * 5000), 431),
    "an address of 20 MB": (b"GET /" + b"a" * (20 << 20), 414),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_headers_beyond_the_limit_are_refused_and_not_kept(strict: RunningServer, what: str) -> None:
    data, status = ENDLESS[what]
    before = _memory(strict)
    refused = ask(strict, data)
    assert refused.status == status
    assert refused.error()["code"] == {431: "headers_too_large", 414: "address_too_long"}[status]
    assert refused.headers["connection"] == "close"
    assert _memory(strict) - before < LITTLE


def test_headers_within_the_limit_are_served(strict: RunningServer) -> None:
    lines = [f"x-{i}: {'a' * 600}" for i in range(90)]
    assert ask(strict, head("GET", "/health", "connection: close", *lines)).status == 200


NO_REQUESTS = {
    "TLS": bytes.fromhex("1603010200010001fc0303") + bytes(range(256)),
    "zeros": bytes(1000),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no path": head("OPTIONS", "*"),
    "a tunnel": head("CONNECT", "elsewhere:80"),
    "line feeds alone": b"GET /health HTTP/1.1\nhost: x\n\n",
    "a length and chunks": head("POST", CHAT, "content-length: 5", "transfer-encoding: chunked")
    + b"0\r\n\r\n",
    "two lengths": head("POST", CHAT, "content-length: 5", "content-length: 6") + b"hello!",
    "a length below 0": head("POST", CHAT, "content-length: -5"),
    "a length beyond all numbers": head("POST", CHAT, f"content-length: {'9' * 40}"),
    "a body in another protocol": post(CHAT, GOOD, "connection: upgrade", "upgrade: h2c"),
    "half a chunk's size": head("POST", CHAT, "transfer-encoding: chunked") + b"zz\r\n",
    "chunks of a byte": head("POST", CHAT, "transfer-encoding: chunked") + b"1\r\n \r\n" * 100_000,
    "an endless extension": head("POST", CHAT, "transfer-encoding: chunked") + b"1;" + b"a" * (1 << 20),
    "endless trailers": head("POST", CHAT, "transfer-encoding: chunked")
    + b"2\r\n{}\r\n0\r\nx-a: "
    + b"a" * (1 << 20),
    "17 requests at once and more": post(CHAT, GOOD) * 40,
}


@pytest.mark.parametrize("what", NO_REQUESTS)
def test_what_is_no_request_gets_an_error_in_the_one_shape_and_an_end(
    strict: RunningServer, what: str
) -> None:
    with connect(strict) as connection:
        connection.sendall(NO_REQUESTS[what])
        data = received(connection)
    last = answer(data[data.rindex(b"HTTP/1.1 ") :])
    assert last.status == 400
    assert last.error()["code"] == "invalid_value"
    assert _is_served(strict)


def test_another_protocol_is_not_taken_up_and_the_request_answered(strict: RunningServer) -> None:
    lines = ("connection: upgrade", "upgrade: websocket", "sec-websocket-key: a", "sec-websocket-version: 13")
    got = ask(strict, head("GET", "/health", *lines) + b"\x81\x05hello")
    assert (got.status, got.headers["connection"]) == (200, "close")


def test_requests_that_come_together_are_answered_in_their_order(strict: RunningServer) -> None:
    asked = post(CHAT, GOOD) + head("GET", "/nothing") + head("GET", "/health", "connection: close")
    with connect(strict) as connection:
        connection.sendall(asked)
        data = received(connection)
    assert [part[:3] for part in data.split(b"HTTP/1.1 ")[1:]] == [b"200", b"404", b"200"]


def test_garbage_after_a_request_waits_for_the_answer_to_it(strict: RunningServer) -> None:
    with connect(strict) as connection:
        connection.sendall(post(CHAT, GOOD) + bytes(100))
        first, second = received(connection).split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200")
    assert b'"finish_reason"' in first
    assert second.startswith(b"400")


def test_half_sent_headers_are_ended(strict: RunningServer) -> None:
    connections = []
    for _ in range(100):
        connections.append(connect(strict))
        connections[-1].sendall(b"GET /health HTTP/1.1\r\nx-a: ")
    assert _is_served(strict)
    for connection in connections:
        ended = answer(received(connection))
        assert (ended.status, ended.error()["code"]) == (408, "request_timeout")
        connection.close()


@asynccontextmanager
async def serving(
    settings: Settings, content: bytes = b"served"
) -> AsyncIterator[tuple[socket.socket, Connection]]:
    """Both ends of a connection to a server without a clock: tests tick."""
    app = Starlette(routes=[Route("/", lambda _: Response(content))])
    config, state = HttpConfig(app, settings), ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(config, state, {}), "127.0.0.1")
    address = server.sockets[0].getsockname()
    with closing(server), socket.create_connection(address, PATIENCE) as client:
        while not state.connections:
            await asyncio.sleep(0.01)
        (connection,) = state.connections
        yield client, cast(Connection, connection)


ASKED = head("GET", "/", "connection: close")


async def test_a_request_that_the_server_has_not_read_yet_is_not_late() -> None:
    """The server was busy; closing would lose the request, and reset the connection."""
    async with serving(Settings(head_seconds=0.01)) as (client, connection):
        await asyncio.sleep(0.1)
        client.sendall(ASKED)
        connection.tick(1)
        assert (await asyncio.to_thread(received, client)).endswith(b"served")


async def test_a_request_that_comes_as_its_connection_has_been_idle_for_too_long_is_answered() -> None:
    async with serving(Settings()) as (client, connection):
        client.sendall(head("GET", "/"))
        data = b""
        while not data.endswith(b"served"):
            data += await asyncio.to_thread(client.recv, 1 << 16)
        client.sendall(ASKED)
        connection.timeout_keep_alive_handler()
        assert (await asyncio.to_thread(received, client)).endswith(b"served")


async def test_a_client_that_goes_on_sending_gets_the_whole_last_answer() -> None:
    """The answer is larger than any buffer of the system."""
    content = b"x" * 8_000_000
    async with serving(Settings(), content) as (client, connection):
        client.sendall(ASKED)
        while not connection.is_closing():
            await asyncio.sleep(0.01)
        client.sendall(b"more")
        assert (await asyncio.to_thread(received, client)).endswith(content)


async def test_the_time_before_a_connection_was_made_is_not_counted() -> None:
    async with serving(Settings(head_seconds=10)) as (client, connection):
        connection.tick(11)
        client.sendall(ASKED)
        assert (await asyncio.to_thread(received, client)).endswith(b"served")


def test_a_connection_that_asks_for_nothing_is_closed(strict: RunningServer) -> None:
    with connect(strict) as connection:
        assert received(connection) == b""


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/cache/toy/a/file"])
def test_a_half_sent_body_is_ended(strict: RunningServer, path: str) -> None:
    method = "PUT" if path.endswith("file") else "POST"
    ended = ask(strict, head(method, path, "content-length: 1000") + b'{"a": 1')
    assert ended.status == 408
    assert ended.headers["connection"] == "close"
    assert b"too slowly" in ended.body


@pytest.mark.slow
def test_a_body_of_which_ever_less_comes_is_ended(strict: RunningServer) -> None:
    sent = 0
    with connect(strict) as connection, pytest.raises(OSError, match=r"reset|pipe"):  # noqa: PT012
        connection.sendall(head("POST", CHAT, f"content-length: {15 << 20}") + b'{"a": "' + b"x" * (10 << 20))
        connection.settimeout(0.2)
        while sent < 2000:
            connection.sendall(b"x")
            sent += 1
            try:
                assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408")
                raise ConnectionResetError("reset")
            except TimeoutError:
                pass
    assert sent < 2000


@pytest.mark.slow
def test_half_sent_bodies_take_no_more_memory_together_than_they_may(start_server: StartServer) -> None:
    server = start_server(
        "--model", "toy=toy:", env={"HEADSTART_MAX_BODIES_MB": "32", "HEADSTART_BODY_SECONDS": "5"}
    )
    before = _memory(server)
    half = head("POST", CHAT, "content-length: 15000000") + b'{"a": "' + b"x" * 14_000_000
    connections = []
    for _ in range(20):
        connections.append(connect(server))
        connections[-1].sendall(half)
    codes = Counter(answer(received(connection)).error()["code"] for connection in connections)
    assert codes["overloaded"] >= 18
    assert codes.keys() <= {"overloaded", "request_timeout"}
    assert _memory(server) - before < (32 << 20) + LITTLE
    for connection in connections:
        connection.close()
    eventually(lambda: _is_served(server))
    large = json.dumps({"model": "toy", "prompt": "a", "max_tokens": 1, "x": "y" * 15_000_000}).encode()
    eventually(lambda: server.http.post("/v1/completions", content=large).status_code == 200)


def test_a_key_can_not_take_all_the_memory_that_bodies_may(start_server: StartServer, tmp_path: Path) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text(
        'max_body_mb = 4\nmax_bodies_mb = 8\nmodels = {toy = "toy:"}\n'
        '[keys.a]\nkey = "a"\n[keys.b]\nkey = "b"\n'
    )
    server = start_server("--config", str(config))
    lines = ("authorization: Bearer a", "content-length: 4000000")
    with connect(server) as first, connect(server) as second:
        for connection in (first, second):
            connection.sendall(head("POST", CHAT, *lines) + b'{"a": "' + b"x" * 3_000_000)
        # Together they are too much: whichever brings it there.
        refused, _, _ = select([first, second], [], [], 60)
        assert answer(received(refused[0])).error()["code"] == "overloaded"
        other = json.dumps({"model": "toy", "prompt": "a", "max_tokens": 1, "x": "y" * 3_000_000}).encode()
        answered = server.http.post("/v1/completions", content=other, headers={"authorization": "Bearer b"})
        assert answered.status_code == 200


def test_without_a_key_nothing_of_a_body_is_read(start_server: StartServer, tmp_path: Path) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text('models = {toy = "toy:"}\n[keys.me]\nkey = "k"\n')
    server = start_server("--config", str(config))
    with connect(server) as connection:
        connection.sendall(head("POST", CHAT, "content-length: 15000000", "expect: 100-continue"))
        refused = answer(received(connection))
    assert (refused.status, refused.error()["code"]) == (401, "invalid_api_key")
    assert refused.headers["connection"] == "close"


@pytest.mark.parametrize("n_bytes", [40_000_000, 200_000_000])
def test_a_client_that_sends_all_before_it_reads_gets_the_early_answer(
    strict: RunningServer, n_bytes: int
) -> None:
    before = _memory(strict)
    with connect(strict) as connection:
        connection.sendall(head("POST", CHAT, f"content-length: {n_bytes}"))
        for _ in range(n_bytes // 1_000_000):
            connection.sendall(b" " * 1_000_000)
        refused = answer(received(connection))
    assert (refused.status, refused.error()["code"]) == (413, "body_too_large")
    assert _memory(strict) - before < LITTLE


def test_a_body_that_is_waited_for_is_asked_for(strict: RunningServer) -> None:
    with connect(strict) as connection:
        connection.sendall(head("POST", CHAT, f"content-length: {len(GOOD)}", "expect: 100-continue"))
        assert connection.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(GOOD)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


@pytest.mark.slow
def test_a_client_that_leaves_its_answer_unread_is_cut(strict: RunningServer) -> None:
    # An answer of some 10 MB, which no buffer of the system holds.
    body = json.dumps({"content": "a" * 300_000, "with_pieces": True}).encode()
    process = psutil.Process(strict.process.pid)
    with connect(strict) as connection:
        port = connection.getsockname()[1]
        connection.sendall(post("/tokenize", body))
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        eventually(lambda: all(not c.raddr or c.raddr.port != port for c in process.net_connections()))
        connection.settimeout(None)
        got = 0
        with suppress(ConnectionResetError):
            got = len(received(connection))
        assert got < 5_000_000


def test_connections_beyond_the_limit_take_the_places_of_idle_ones(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:", env={"HEADSTART_MAX_CONNECTIONS": "10"})
    idle = [connect(server) for _ in range(60)]
    for connection in idle:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
    for _ in range(5):
        assert ask(server, head("GET", "/health", "connection: close")).status == 200
    assert len(psutil.Process(server.process.pid).net_connections()) < 20
    for connection in idle:
        connection.close()


def test_where_all_connections_are_busy_another_is_told_so(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:eos=0,ms_per_token=5", env={"HEADSTART_MAX_CONNECTIONS": "2"})
    body = json.dumps({"model": "toy", "prompt": "a", "max_tokens": 2000, "stream": True}).encode()
    busy = [connect(server) for _ in range(2)]
    for connection in busy:
        connection.sendall(post("/v1/completions", body))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    with connect(server) as connection:
        refused = answer(received(connection))
    assert (refused.status, refused.error()["code"]) == (503, "overloaded")
    assert refused.headers["retry-after"]
    for connection in busy:
        connection.close()
    eventually(lambda: ask(server, head("GET", "/health", "connection: close")).status == 200)


@pytest.mark.parametrize("given", ["a\tb", "a" * 129, "", "é%0d%0aset-cookie: x=1"])
def test_a_request_id_never_makes_another_header(strict: RunningServer, given: str) -> None:
    asked = f"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-request-id: {given}\r\n\r\n"
    got = ask(strict, asked.encode("latin-1"))
    assert got.status == 200
    assert got.headers["x-request-id"]
    assert "set-cookie" not in got.headers
