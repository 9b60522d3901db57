"""Frames on the socket between server and worker: four bytes of length (little-endian), then MessagePack."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")

HEADER = struct.Struct("<I")


def frame(message: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(message)
    return HEADER.pack(len(body)) + body


class Frames(Generic[T]):
    """Cuts received bytes into messages of one type."""

    def __init__(self, kind: object) -> None:
        self.decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)
        self.buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[T]:
        self.buffer += data
        while len(self.buffer) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(self.buffer)[0]
            if len(self.buffer) < end:
                return
            body = bytes(self.buffer[HEADER.size : end])
            del self.buffer[:end]
            yield self.decoder.decode(body)
