"""Bytes sent to a socket that are almost HTTP."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from typing import Any
from urllib.parse import urlsplit

from hypothesis import strategies as st

from fuzz.victim import CLEAN, Fault, Victim

Json = dict[str, Any]
Step = list[Any]

LISTEN_SECONDS = 2.0
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})[^\n]*\n")
BODY = '{"model":"toy","messages":[{"role":"user","content":"x"}],"max_tokens":1}'
POST = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n"
LINES = [
    "GET /health HTTP/1.1\r\n",
    "POST /v1/chat/completions HTTP/1.1\r\n",
    "GET /health HTTP/1.0\r\n",
    "GET /health\r\n",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "GET http://a/health HTTP/1.1\r\n",
    "CONNECT a:80 HTTP/1.1\r\n",
    "GET /\x00 HTTP/1.1\r\n",
    "GET /%00%ff%2e%2e/ HTTP/1.1\r\n",
    "OPTIONS * HTTP/1.1\r\n",
    "\r\n",
    "\x16\x03\x01\x02\x00\x01\x00",
]
HEADERS = [
    "host: a\r\n",
    "content-length: 73\r\n",
    "content-length: 5\r\n",
    "content-length: -1\r\n",
    "content-length: 99999999999999999999\r\n",
    "content-length: 5\r\ncontent-length: 73\r\n",
    "transfer-encoding: chunked\r\n",
    "transfer-encoding: gzip, chunked\r\n",
    "transfer-encoding: chunked\r\ncontent-length: 5\r\n",
    "expect: 100-continue\r\n",
    "upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-key: x\r\nsec-websocket-version: 13\r\n",
    "upgrade: h2c\r\n",
    "connection: close\r\n",
    "x: \xff\xfe\r\n",
    "x : y\r\n",
    " folded\r\n",
    "x-request-id: a\tb\r\n",
    "authorization: Bearer \xe9\r\n",
    "\r\n",
]
ENDS = [
    "\r\n",
    BODY,
    "5\r\nhello\r\n",
    "0\r\n\r\n",
    "ffffffffffffffff\r\n",
    "-1\r\n",
    "5;x=y\r\nhel",
    "{",
    "\x00",
    "\n\n",
]


def _known(*steps: Step) -> Json:
    return {"kind": "framing", "steps": list(steps)}


KNOWN: list[Json] = [
    # The header of 200 MB, to a tenth.
    _known(["send", "GET /health HTTP/1.1\r\nhost: a\r\nx: "], ["send", "a" * 1000, 20_000]),
    _known(["send", "GET /health HTTP/1.1\r\n"], ["send", "x: y\r\n", 200_000]),
    _known(["send", "GET /" + "a" * 1000, 5_000]),
    _known(["send", "GET /health HTTP/1.1\r\nhost:"], ["wait", 0.5], ["close"]),
    _known(["send", POST + "content-length: 1000\r\n\r\n" + BODY], ["wait", 0.2], ["close"]),
    _known(["send", POST + "content-length: 1000\r\n\r\n" + BODY], ["shut"]),
    _known(["send", POST + "content-length: 5\r\n\r\n" + BODY]),
    _known(["send", POST + "content-length: 99999999999\r\n\r\n"], ["send", "a" * 1000, 1000]),
    _known(["send", POST + "transfer-encoding: chunked\r\n\r\n"], ["send", "5\r\nhello\r\n", 50_000]),
    _known(
        ["send", POST + "transfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n"], ["send", "a" * 1000, 1000]
    ),
    _known(["send", POST + "transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n"]),
    _known(
        ["send", POST + "expect: 100-continue\r\ncontent-length: 73\r\n\r\n"], ["wait", 0.3], ["send", BODY]
    ),
    _known(["send", "GET /health HTTP/1.1\r\nhost: a\r\n\r\n", 300]),
    _known(
        ["send", "PUT /v1/cache/toy/attack/file HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\nabc"],
        ["close"],
    ),
    _known(
        ["send", "PUT /v1/cache/toy/attack/file HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\nabc"],
        ["shut"],
    ),
]


def recipes() -> st.SearchStrategy[Json]:
    opening = st.tuples(
        st.sampled_from(LINES),
        st.lists(st.sampled_from(HEADERS), max_size=4),
        st.lists(st.sampled_from(ENDS), max_size=3),
    ).map(lambda parts: ["send", parts[0] + "".join(parts[1]) + "".join(parts[2])])
    rest = st.one_of(
        st.sampled_from([*LINES, *HEADERS, *ENDS]).map(lambda text: ["send", text]),
        st.tuples(st.text("ab:\r\n \x00\xff", max_size=30), st.integers(1, 2000)).map(
            lambda parts: ["send", parts[0], parts[1]]
        ),
        st.just(["wait", 0.05]),
        st.just(["shut"]),
    )
    steps = st.tuples(opening, st.lists(rest, max_size=3)).map(lambda parts: [parts[0], *parts[1]])
    return st.fixed_dictionaries({"kind": st.just("framing"), "steps": steps})


def attack(victim: Victim, recipe: Json) -> None:
    address = urlsplit(victim.server.url)
    with socket.create_connection((address.hostname, address.port), timeout=LISTEN_SECONDS) as connection:
        # The server may close at any time, and a socket that nobody reads may be full.
        with contextlib.suppress(OSError):
            for step in recipe["steps"]:
                if step[0] == "close":
                    return
                _do(connection, step)
        _judge(_heard(connection))


def _do(connection: socket.socket, step: Step) -> None:
    match step:
        case ["send", text, *n]:
            piece = text.encode("latin-1", "replace")
            times = n[0] if n else 1
            at_once = max(1, (1 << 16) // max(len(piece), 1))
            while times > 0:
                connection.sendall(piece * min(times, at_once))
                times -= at_once
        case ["wait", seconds]:
            time.sleep(seconds)
        case ["shut"]:
            connection.shutdown(socket.SHUT_WR)


def _heard(connection: socket.socket) -> bytes:
    heard = b""
    deadline = time.monotonic() + LISTEN_SECONDS
    connection.settimeout(0.3)
    while time.monotonic() < deadline:
        try:
            piece = connection.recv(1 << 16)
        except TimeoutError:
            if heard:
                break
            continue
        except OSError:
            break
        if not piece:
            break
        heard += piece
    return heard


def _judge(heard: bytes) -> None:
    for status in map(int, STATUS.findall(heard)):
        if status >= 500 and status not in CLEAN:
            raise Fault(f"answered with {status}: {heard[:500]!r}")
    if heard and not STATUS.match(heard):
        raise Fault(f"answered with no HTTP: {heard[:200]!r}")
