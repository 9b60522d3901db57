"""How a server ends: every request that runs is told so, and nothing else delays it."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from conftest import StartServer
from raw_http import answer, connect, head, post, received
from servers import Json, RunningServer

SLOW = "toy=toy:eos=0,ms_per_token=5"
USER = {"role": "user", "content": "Tell me all about ships."}
CHAT: Json = {"model": "toy", "messages": [USER], "max_tokens": 3000}
REQUESTS: dict[str, Json] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "toy", "prompt": "a", "max_tokens": 3000},
    "/v1/messages": CHAT,
    "/v1/responses": {"model": "toy", "input": "a", "max_output_tokens": 3000},
}


def _stopped(server: RunningServer, times: int, path: str, body: Json) -> tuple[bytes, str]:
    """The answer to a request that runs when the server is told to stop, and the log."""
    with connect(server) as connection:
        connection.sendall(post(path, json.dumps(body).encode()))
        if body.get("stream"):
            begun = connection.recv(1 << 16)
            while b"data: " not in begun:
                begun += connection.recv(1 << 16)
        else:
            begun = b""
            while server.http.get("/v1/models").status_code != 200:
                pass
        for _ in range(times):
            server.process.send_signal(signal.SIGTERM)
        data = begun + received(connection)
    assert server.process.wait(30) == 0
    return data, server.log.read_text()


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.slow
def test_a_request_that_outlasts_the_drain_is_told_so_in_its_own_form(
    start_server: StartServer, path: str, stream: bool
) -> None:
    server = start_server("--model", SLOW, env={"HEADSTART_DRAIN_SECONDS": "1"})
    data, log = _stopped(server, 1, path, {**REQUESTS[path], "stream": stream})
    if stream:
        assert data.startswith(b"HTTP/1.1 200")
        assert data.endswith(b"0\r\n\r\n")
        assert b"being stopped" in data
        if path == "/v1/messages":
            assert b"event: error\n" in data[-700:]
        elif path == "/v1/responses":
            assert b"event: response.failed\n" in data or b"event: error\n" in data
        else:
            assert b"data: [DONE]" in data[-100:]
    else:
        told = answer(data)
        assert told.status == 503
        assert told.headers["retry-after"]
        if path == "/v1/messages":
            assert json.loads(told.body)["type"] == "error"
        else:
            assert told.error()["code"] == "shutting_down"
    assert "Traceback" not in log


def test_half_sent_requests_and_idle_connections_do_not_delay_a_stop(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:", env={"HEADSTART_DRAIN_SECONDS": "600"})
    idle, silent, half_head, half_body, half_file = (connect(server) for _ in range(5))
    idle.sendall(head("GET", "/health"))
    answered = b""
    while not answered.endswith(b"}"):
        answered += idle.recv(1 << 16)
    half_head.sendall(b"GET /health HTTP/1.1\r\nx-a: ")
    half_body.sendall(head("POST", "/v1/chat/completions", "content-length: 1000") + b'{"a": 1')
    half_file.sendall(head("PUT", "/v1/cache/toy/a/file", "content-length: 1000") + b"x")
    assert server.http.get("/health").status_code == 200
    server.process.send_signal(signal.SIGTERM)
    for connection in (half_body, half_file):
        assert answer(received(connection)).error()["code"] == "shutting_down"
    for connection in (idle, silent, half_head):
        assert received(connection) == b""
    for connection in (idle, silent, half_head, half_body, half_file):
        connection.close()
    # Far less than the drain.
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_running_requests_at_once(start_server: StartServer, number: int) -> None:
    server = start_server("--model", SLOW, env={"HEADSTART_DRAIN_SECONDS": "600"})
    with connect(server) as connection:
        connection.sendall(
            post("/v1/completions", json.dumps({**REQUESTS["/v1/completions"], "stream": True}).encode())
        )
        assert b"200 OK" in connection.recv(1 << 16)
        server.process.send_signal(signal.SIGTERM)
        # Till it has been heard connections are taken.
        while True:
            try:
                connect(server).close()
            except OSError:
                break
        server.process.send_signal(number)
        assert b"being stopped" in received(connection)[-700:]
    assert server.process.wait(60) == 0


def test_what_came_before_a_stop_is_answered_in_full(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:eos=0,ms_per_token=5")
    with ThreadPoolExecutor(4) as pool:
        body: dict[str, Any] = {"model": "toy", "prompt": "a", "max_tokens": 200, "stream": True}
        streams = [httpx.Client(base_url=server.url, timeout=60) for _ in range(4)]
        opened = [http.stream("POST", "/v1/completions", json=body) for http in streams]
        responses = [each.__enter__() for each in opened]
        server.process.send_signal(signal.SIGTERM)
        texts = list(pool.map(lambda response: b"".join(response.iter_bytes()), responses))
        for each, http in zip(opened, streams, strict=True):
            each.__exit__(None, None, None)
            http.close()
    assert all(text.endswith(b"data: [DONE]\n\n") for text in texts)
    assert not any(b"being stopped" in text for text in texts)
    assert server.process.wait(60) == 0
