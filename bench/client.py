"""A client of OpenAI-compatible servers that takes the time of each piece of text.

The standard library's, because what a client spends itself is added to every figure.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
TIMEOUT_SECONDS = 600


class BenchFailed(Exception):
    """A server refused, or did something else than what was to be measured."""


@dataclass(frozen=True)
class Reply:
    """One streamed answer. `sent`: when the request was sent, in seconds of perf_counter; `arrivals_ms`: when
    each non-empty piece of text came after that. `usage` and `timings` are the server's account."""

    text: str
    sent: float
    arrivals_ms: tuple[float, ...]
    total_ms: float
    usage: Json
    timings: Json

    @property
    def ttft_ms(self) -> float:
        """To the first non-empty content. Raises BenchFailed for an answer without any."""
        if not self.arrivals_ms:
            raise BenchFailed("an answer is empty, so it has no first token")
        return self.arrivals_ms[0]

    @property
    def prompt_tokens(self) -> int:
        return int(self.usage["prompt_tokens"])

    @property
    def evaluated(self) -> int:
        return int(self.timings["prompt_n"])

    @property
    def generated(self) -> int:
        return int(self.usage["completion_tokens"])

    @property
    def gaps_ms(self) -> list[float]:
        """Between one piece of text and the next."""
        return [later - sooner for sooner, later in zip(self.arrivals_ms, self.arrivals_ms[1:], strict=False)]

    @property
    def token_ms(self) -> float:
        """Time for each token after the first."""
        return (self.arrivals_ms[-1] - self.ttft_ms) / max(self.generated - 1, 1)


class Connection:
    """One kept-alive connection to the server at 127.0.0.1:`port`; for one thread."""

    def __init__(self, port: int) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def call(self, method: str, path: str, body: Json | None = None) -> Json:
        """Raises BenchFailed, OSError or HTTPException."""
        response = self._send(method, path, body)
        answer: Json = json.loads(response.read())
        return answer

    def ask(self, path: str, body: Json) -> Reply:
        """One greedy, streamed answer. Raises BenchFailed, OSError or HTTPException."""
        request = {"temperature": 0, **body, "stream": True, "stream_options": {"include_usage": True}}
        started = perf_counter()
        response = self._send("POST", path, request)
        pieces: list[str] = []
        arrivals: list[float] = []
        account: Json = {}
        for data in _events(response):
            now = 1000 * (perf_counter() - started)
            chunk = json.loads(data)
            if "error" in chunk:
                raise BenchFailed(f"{path}: {chunk['error']}")
            if piece := _text(chunk):
                arrivals.append(now)
                pieces.append(piece)
            account |= {key: chunk[key] for key in ("usage", "timings") if chunk.get(key)}
        total = 1000 * (perf_counter() - started)
        return Reply("".join(pieces), started, tuple(arrivals), total, account["usage"], account["timings"])

    def _send(self, method: str, path: str, body: Json | None) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        try:
            response = self._exchange(method, path, data)
        except ConnectionError:
            # Servers close connections that were idle for a while.
            self._http.close()
            response = self._exchange(method, path, data)
        if response.status != 200:
            raise BenchFailed(f"{method} {path}: {response.status} {response.read().decode()[:500]}")
        return response

    def _exchange(self, method: str, path: str, data: bytes | None) -> http.client.HTTPResponse:
        self._http.request(method, path, data, {"Content-Type": "application/json"})
        return self._http.getresponse()


def _events(response: http.client.HTTPResponse) -> Iterator[bytes]:
    # Read to the end, also after [DONE]: otherwise the connection can't be used again.
    for line in response:
        data = line.removeprefix(b"data: ").strip()
        if line.startswith(b"data: ") and data != b"[DONE]":
            yield data


def _text(chunk: Json) -> str:
    if not chunk.get("choices"):
        return ""
    choice = chunk["choices"][0]
    return str((choice["delta"].get("content") if "delta" in choice else choice.get("text")) or "")
