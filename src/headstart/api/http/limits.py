"""How much of a client is borne with, before it is known who asks."""

from __future__ import annotations

from dataclasses import dataclass

MAX_HEAD_BYTES = 64 << 10
MAX_ADDRESS_BYTES = 8 << 10
MAX_HEADERS = 100
# Requests that wait for the answer to one before them on the same connection.
MAX_PIPELINED = 16
# Bytes a second of a body or an answer.
LEAST_RATE = 16 << 10
# What chunks may have around their contents, beside as much as the contents.
MAX_CHUNKING_BYTES = 64 << 10
# A client that goes on sending reads its answer only afterwards. What comes is thrown away until the client
# has been silent for a while, for so long and so many bytes.
LINGER_SILENT_SECONDS = 5.0
LINGER_SECONDS = 30.0
LINGER_BYTES = 256 << 20


@dataclass(frozen=True)
class Patience:
    """Most connections at once; the seconds that a request's headers may take; and those that a client may be
    behind the least rate, with a body and with an answer."""

    connections: int
    head: float
    body: float
    send: float


class Pace:
    """Seconds that a client is behind the least rate; being ahead of it once counts for nothing later."""

    def __init__(self, most: float) -> None:
        self.most = most
        self.seconds = 0.0
        self._size = 0

    def behind(self, seconds: float, size: int) -> bool:
        """Whether it is too far behind, after so many more seconds and with `size` bytes in all."""
        self.seconds = max(self.seconds + seconds - (size - self._size) / LEAST_RATE, 0.0)
        self._size = size
        return self.seconds > self.most
