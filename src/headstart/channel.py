"""Frames on the socket between server and worker: four bytes of length (little-endian), then MessagePack."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")

HEADER = struct.Struct("<I")
# The longest message is a request with as many token ids as a body can hold.
MOST_BYTES = 1 << 30


class Unsendable(ValueError):
    """A message that can't be encoded as a frame: a number or text outside the format, or too long."""


class Garbled(ValueError):
    """Received bytes that are no valid frame. The frames after them can't be found either."""


def frame(message: msgspec.Struct) -> bytes:
    """Raises Unsendable."""
    try:
        body = msgspec.msgpack.encode(message)
    except (OverflowError, ValueError) as error:
        raise Unsendable(str(error)) from error
    if len(body) > MOST_BYTES:
        raise Unsendable(f"it takes {len(body)} bytes; {MOST_BYTES} are allowed")
    return HEADER.pack(len(body)) + body


class Frames(Generic[T]):
    """Splits received bytes into messages of one type. An incomplete frame stays in the buffer."""

    def __init__(self, kind: object) -> None:
        self.decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)
        self.buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[T]:
        """Raises Garbled."""
        self.buffer += data
        while len(self.buffer) >= HEADER.size:
            (size,) = HEADER.unpack_from(self.buffer)
            if size > MOST_BYTES:
                raise Garbled(f"a frame of {size} bytes; {MOST_BYTES} are allowed")
            end = HEADER.size + size
            if len(self.buffer) < end:
                return
            body = bytes(self.buffer[HEADER.size : end])
            del self.buffer[:end]
            try:
                message = self.decoder.decode(body)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise Garbled(f"a frame that is not a message: {error}") from error
            yield message
