"""A request's head (request line and headers), as it arrives."""

from __future__ import annotations

import urllib.parse
from typing import Any

import httptools

from headstart.api.http import limits
from headstart.errors import AddressTooLong, BadRequest, HeadersTooLarge


class RequestHead:
    """Refuses a head as soon as it is too large. The parser reports only complete parts, so received bytes
    are counted as well."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self._received_bytes = 0
        self._header_bytes = 0

    @property
    def path(self) -> str:
        """The path as far as it was received; it selects the error format of a refusal."""
        return self.url.decode("latin-1").partition("?")[0]

    @property
    def has_body(self) -> bool:
        return any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers)

    def count_bytes(self, size: int) -> None:
        """Counts `size` more bytes of an incomplete head. Raises HeadersTooLarge."""
        self._received_bytes += size
        _check(self._received_bytes)

    def add_url(self, url: bytes) -> None:
        """Raises AddressTooLong."""
        self.url += url
        if len(self.url) > limits.MAX_ADDRESS_BYTES:
            raise AddressTooLong(f"The address is longer than {limits.MAX_ADDRESS_BYTES} bytes.")

    def add_header(self, name: bytes, value: bytes) -> None:
        """Raises HeadersTooLarge."""
        self.headers.append((name.lower(), value))
        self._header_bytes += len(name) + len(value)
        _check(self._header_bytes)
        if len(self.headers) > limits.MAX_HEADERS:
            raise HeadersTooLarge(f"The request has more than {limits.MAX_HEADERS} headers.")

    def target(self) -> dict[str, Any]:
        """The ASGI scope's path and query string. Raises BadRequest."""
        try:
            parsed = httptools.parse_url(self.url)
            path = (parsed.path or b"").decode("ascii")
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
            path = ""
        if not path.startswith("/"):
            raise BadRequest("The address has no path.")
        return {
            "path": urllib.parse.unquote(path),
            "raw_path": parsed.path,
            "query_string": parsed.query or b"",
        }


def _check(size: int) -> None:
    if size > limits.MAX_HEAD_BYTES:
        raise HeadersTooLarge(f"The request's headers have more than {limits.MAX_HEAD_BYTES} bytes.")
