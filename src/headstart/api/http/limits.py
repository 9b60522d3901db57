"""Limits on clients that apply before authentication."""

from __future__ import annotations

from dataclasses import dataclass

MAX_HEAD_BYTES = 64 << 10
MAX_ADDRESS_BYTES = 8 << 10
MAX_HEADERS = 100
# Requests on one connection that wait for an earlier one's answer.
MAX_PIPELINED = 16
# Bytes per second of a body or an answer.
LEAST_RATE = 16 << 10
# Bytes of chunked encoding allowed in addition to as many as the contents have.
MAX_CHUNKING_BYTES = 64 << 10
# A client that is still sending reads its answer only afterwards. Its data is discarded until it has been
# silent for a while, up to this time and this many bytes.
LINGER_SILENT_SECONDS = 5.0
LINGER_SECONDS = 30.0
LINGER_BYTES = 256 << 20


@dataclass(frozen=True)
class Patience:
    """Maximum number of connections; seconds that a request's headers may take; seconds that a client may be
    behind the least rate, in sending a body and in reading an answer."""

    connections: int
    head: float
    body: float
    send: float


class Pace:
    """Counts the seconds that a client is behind the least rate. Being ahead earns no credit."""

    def __init__(self, most: float) -> None:
        self.most = most
        self.seconds = 0.0
        self._size = 0

    def behind(self, seconds: float, size: int) -> bool:
        """Whether it is too far behind, after `seconds` more and with `size` bytes in all."""
        self.seconds = max(self.seconds + seconds - (size - self._size) / LEAST_RATE, 0.0)
        self._size = size
        return self.seconds > self.most
