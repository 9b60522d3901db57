"""The header of a block's file. Every field is checked before it is used.

8 bytes   MAGIC, with the number of this format
32 bytes  BLAKE3 hash of the rest
4 bytes   length of the fields, little-endian
fields    MessagePack: `_Fields`
tokens    int32, in the machine's byte order
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct as Packed
from typing import Annotated

import msgspec
from blake3 import blake3
from msgspec import Meta, Struct

# As many as a chunk of prefill may have: blocks end where prefill was cut.
MAX_TOKENS = 4096
MAGIC = b"HSBLOCK1"
START = Packed("<8s32sI")
HASHED_FROM = len(MAGIC) + 32
MAX_FIELDS = 3 << 10
MAX_HEADER = START.size + MAX_FIELDS + 4 * MAX_TOKENS
# The largest known block, of a model of 65 billion parameters without grouped heads, has 1.3 GB.
MAX_BYTES = 4 << 30

Address = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Position = Annotated[int, Meta(ge=0, lt=1 << 31)]
Cut = Annotated[int, Meta(gt=-(1 << 31), lt=1 << 31)]
Size = Annotated[int, Meta(ge=0, le=MAX_BYTES)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Hashes = tuple[bytes, bytes]


class DamagedBlock(Exception):
    """The file is not the block that was written."""


@dataclass(frozen=True)
class BlockHeader:
    """`parent`: the address of the block before; "" for a first block. `root`: what identifies everything
    that values depend on besides the tokens. `start`: the position of the first token. `owner`: "" for a
    public block. `cuts`: as in Block, None where values aren't exact; those have the id of their `run`.
    `created`: in seconds of time.time()."""

    address: str
    parent: str
    root: str
    start: int
    owner: str
    cuts: tuple[int, ...] | None
    run: str
    tokens: Sequence[int]
    data_bytes: int
    checkpoint_bytes: int
    created: float

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class _Fields(Struct, frozen=True, forbid_unknown_fields=True):
    """`hashes`: of data and checkpoint."""

    address: Address
    parent: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")]
    root: Address
    start: Position
    owner: Annotated[str, Meta(max_length=128)]
    cuts: Annotated[tuple[Cut, ...], Meta(max_length=MAX_TOKENS + 1)] | None
    run: Annotated[str, Meta(max_length=64)]
    n_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    data_bytes: Size
    checkpoint_bytes: Size
    created: Annotated[float, Meta(ge=0, le=1e12)]
    hashes: tuple[Digest, Digest]


def address_of(
    parent: str,
    root: str,
    owner: str,
    start: int,
    tokens: Sequence[int],
    cuts: tuple[int, ...] | None,
    run: str,
) -> str:
    """The address of a block: equal addresses mean equal values. A first block has the root in its parent's
    place."""
    ids = array("i", tokens).tobytes()
    return blake3(msgspec.msgpack.encode((parent or root, owner, start, cuts, run, ids))).hexdigest()


def encoded(header: BlockHeader, hashes: Hashes) -> bytes:
    """The header as it is stored, with the hashes of data and checkpoint."""
    fields = _Fields(
        header.address,
        header.parent,
        header.root,
        header.start,
        header.owner,
        header.cuts,
        header.run,
        len(header.tokens),
        header.data_bytes,
        header.checkpoint_bytes,
        header.created,
        hashes,
    )
    encoded = msgspec.msgpack.encode(fields)
    assert len(encoded) <= MAX_FIELDS, "more than is read of a header"
    rest = len(encoded).to_bytes(4, "little") + encoded + array("i", header.tokens).tobytes()
    return MAGIC + blake3(rest).digest() + rest


def decoded(content: bytes) -> tuple[BlockHeader, Hashes, int]:
    """The header at the start of `content`, the hashes of data and checkpoint, and the header's length.
    Raises DamagedBlock."""
    if len(content) < START.size:
        raise DamagedBlock("it is too short")
    magic, digest, length = START.unpack_from(content)
    if magic != MAGIC:
        raise DamagedBlock("it has another format")
    try:
        fields = msgspec.msgpack.decode(content[START.size : START.size + length], type=_Fields)
    except (ValueError, RecursionError) as error:
        raise DamagedBlock(f"unreadable fields: {error}") from error
    begin = START.size + length
    end = begin + 4 * fields.n_tokens
    if len(content) < end:
        raise DamagedBlock("it is too short")
    if blake3(content[HASHED_FROM:end]).digest() != digest:
        raise DamagedBlock("wrong hash of the header")
    header = BlockHeader(
        fields.address,
        fields.parent,
        fields.root,
        fields.start,
        fields.owner,
        fields.cuts,
        fields.run,
        array("i", content[begin:end]),
        fields.data_bytes,
        fields.checkpoint_bytes,
        fields.created,
    )
    if problem := problem_of(header):
        raise DamagedBlock(problem)
    return header, fields.hashes, end


def problem_of(header: BlockHeader) -> str:
    """How the fields contradict each other; "" if they don't."""
    cuts = [abs(cut) for cut in header.cuts or ()]
    address = address_of(
        header.parent, header.root, header.owner, header.start, header.tokens, header.cuts, header.run
    )
    rules = {
        "its address doesn't match its content": header.address == address,
        "it has no parent or shouldn't have one": (header.start == 0) == (header.parent == ""),
        "its tokens aren't ids": min(header.tokens) >= 0,
        "it has both cuts and a run, or neither": (header.cuts is None) == (header.run != ""),
        "its cuts aren't in order": cuts == sorted(set(cuts)),
        "its cuts are outside": all(header.start <= cut <= header.end for cut in cuts),
    }
    return next((problem for problem, holds in rules.items() if not holds), "")
