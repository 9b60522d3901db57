"""Bytes to a server and back, for what no client library sends."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from servers import Json, RunningServer

PATIENCE = 60


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def error(self) -> Json:
        """The error, in the one shape."""
        told = json.loads(self.body)["error"]
        assert told.keys() == {"message", "type", "param", "code"}, told
        assert self.headers["content-type"] == "application/json"
        assert self.headers["x-request-id"]
        return dict(told)


def connect(server: RunningServer) -> socket.socket:
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port))
    connection.settimeout(PATIENCE)
    return connection


def head(method: str, path: str, *lines: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: x", *lines, "", ""]).encode()


def post(path: str, body: bytes, *lines: str) -> bytes:
    return head("POST", path, f"content-length: {len(body)}", *lines) + body


def received(connection: socket.socket) -> bytes:
    """All data until the server ends the connection. A reset after the answer is an end, too."""
    data = b""
    try:
        while piece := connection.recv(1 << 16):
            data += piece
    except ConnectionResetError:
        if not data:
            raise
    return data


def answer(data: bytes) -> Answer:
    start, _, body = data.partition(b"\r\n\r\n")
    first, *lines = start.decode("latin-1").split("\r\n")
    headers: dict[str, Any] = dict(line.lower().split(": ", 1) for line in lines)
    return Answer(int(first.split()[1]), headers, body)


def ask(server: RunningServer, data: bytes) -> Answer:
    """Sends all of it first, and reads then, until the server closes."""
    with connect(server) as connection:
        connection.sendall(data)
        return answer(received(connection))
