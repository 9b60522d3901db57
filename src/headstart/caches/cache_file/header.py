"""The header of a cache file. Every field is checked before it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct as Packed
from typing import Annotated, Any, BinaryIO, Literal, cast

import msgspec
from blake3 import blake3
from msgspec import Meta, Struct

from headstart.caches.cache_file.entry_checks import entry_of
from headstart.caches.entry import FORMS, Entry, Form, StoredForm
from headstart.json_scan import is_deeper
from headstart.regular_files import shown

FORMAT = "headstart/1"
LENGTH = Packed("<Q")
MAX_HEADER = 64 << 20
NO_HASH = "0" * 64
BESIDE = "bytes "
HASH = "blake3"
METADATA = "__metadata__"
# Nesting: the header, its tensors, and the numbers of each.
LEVELS = 3
WIDTHS = {"tokens": ("I32", 4), "state": ("U8", 1)}
Bytes = Annotated[int, Meta(ge=0, le=1 << 60)]
Hash = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Decimal = Annotated[str, Meta(pattern=r"^(0|[1-9][0-9]{0,17})\Z")]


class Corrupt(Exception):
    """The file is not as it was written."""


class Tensor(Struct, frozen=True, forbid_unknown_fields=True):
    dtype: Literal["I32", "U8"]
    shape: tuple[Annotated[int, Meta(ge=1, le=1 << 60)]]
    data_offsets: tuple[Bytes, Bytes]


@dataclass(frozen=True)
class Header:
    """`start`: the offset of the tensors in the file. `sidecar_sizes`: the sizes of the states in sidecar
    files. Each form has token ids and a state, each with a hash."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    start: int

    @property
    def end(self) -> int:
        """The end of the file's content."""
        return self.start + max((tensor.data_offsets[1] for tensor in self.tensors.values()), default=0)

    @property
    def sidecar_sizes(self) -> dict[Form, int]:
        return {
            cast(Form, name.removeprefix(BESIDE).removesuffix(".state")): int(size)
            for name, size in self.metadata.items()
            if name.startswith(BESIDE)
        }

    @property
    def forms(self) -> dict[Form, StoredForm]:
        sizes = self.sidecar_sizes
        found: dict[Form, StoredForm] = {}
        for form in (form for form in FORMS if f"{form}.tokens" in self.tensors):
            (n_tokens,) = self.tensors[f"{form}.tokens"].shape
            if form in sizes:
                found[form] = StoredForm(n_tokens, 0, sizes[form], in_sidecar=True)
            else:
                begin, end = self.tensors[f"{form}.state"].data_offsets
                found[form] = StoredForm(n_tokens, self.start + begin, end - begin)
        return found

    @property
    def entry(self) -> Entry:
        """The entry in the header. Raises Corrupt."""
        try:
            entry = entry_of(self.metadata["entry"])
        except (KeyError, ValueError) as error:
            raise Corrupt(f"unreadable entry: {error}") from error
        forms = self.forms
        if not forms.keys() <= set(entry.content.forms) or forms.keys() & set(entry.evicted):
            raise Corrupt("states of forms that it doesn't have")
        if entry.version < 1:
            raise Corrupt("unreadable entry: version: it is at least 1")
        return msgspec.structs.replace(entry, forms=forms, identity=(0, 0, 0, 0))

    def hash_of(self, name: str) -> str:
        """The hash of a tensor, or of a state in a sidecar file."""
        return self.metadata[f"{HASH} {name}"]


def header_text(entry: Entry, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """The header as JSON; `hashed` fills in its own hash."""
    described = msgspec.structs.replace(entry, forms={}, identity=(0, 0, 0, 0))
    content = msgspec.json.encode(described).decode()
    own = {"format": FORMAT, HASH: NO_HASH, "entry": content, **metadata}
    return json.dumps({METADATA: own, **msgspec.to_builtins(dict(tensors))}).encode()


def hashed(text: bytes) -> bytes:
    """The header with its own hash, in the place that `header_text` left for it."""
    return text.replace(NO_HASH.encode(), blake3(text).hexdigest().encode(), 1)


def read_header(file: BinaryIO) -> Header:
    """Reads the header and checks its hash and its fields. Raises Corrupt or OSError."""
    try:
        return _read(file)
    except Corrupt as error:
        raise Corrupt(f"{shown(file.name)}: {error}") from error


def _read(file: BinaryIO) -> Header:
    start = file.read(LENGTH.size)
    length = LENGTH.unpack(start)[0] if len(start) == LENGTH.size else 0
    if not 0 < length <= MAX_HEADER:
        raise Corrupt("no header")
    text = file.read(length)
    if is_deeper(text, LEVELS):
        raise Corrupt("unreadable header: it is nested too deeply")
    try:
        parts = msgspec.convert(json.loads(text.decode(), object_pairs_hook=_unique), dict[str, Any])
        metadata = msgspec.convert(parts.pop(METADATA), dict[str, str])
        if metadata["format"] != FORMAT:
            raise Corrupt(f"format {metadata['format'][:80]!r} instead of {FORMAT!r}")
        own = msgspec.convert(metadata[HASH], Hash)
        if own != blake3(text.replace(own.encode(), NO_HASH.encode(), 1)).hexdigest():
            raise Corrupt("wrong hash of the header")
        header = Header(metadata, msgspec.convert(parts, dict[str, Tensor]), LENGTH.size + length)
    except (ValueError, KeyError, RecursionError) as error:
        raise Corrupt(f"unreadable header: {str(error)[:200]}") from error
    _check(header)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a duplicate key, since other readers may take the first value."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _check(header: Header) -> None:
    """Checks that the tensors are those of a cache, have the right types and sizes, follow each other without
    gaps, and all have hashes. Raises Corrupt."""
    sizes = {name: size for name, size in header.metadata.items() if name.startswith(BESIDE)}
    inside = set(header.tensors)
    outside = {name.removeprefix(BESIDE) for name in sizes}
    forms = {name.partition(".")[0] for name in inside | outside}
    expected = {f"{form}.{kind}" for form in forms for kind in WIDTHS}
    if not forms <= set(FORMS) or inside | outside != expected or inside & outside:
        raise Corrupt("other tensors than a cache has")
    if any(name.endswith(".tokens") for name in outside):
        raise Corrupt("other tensors than a cache has")
    try:
        msgspec.convert({name: header.hash_of(name) for name in expected}, dict[str, Hash])
        msgspec.convert(sizes, dict[str, Decimal])
    except (KeyError, msgspec.ValidationError) as error:
        raise Corrupt(f"an invalid hash or size: {error}") from error
    end = 0
    for name, tensor in sorted(header.tensors.items(), key=lambda item: item[1].data_offsets):
        dtype, width = WIDTHS[name.partition(".")[2]]
        begin, after = tensor.data_offsets
        if tensor.dtype != dtype or begin != end or after != begin + width * tensor.shape[0]:
            raise Corrupt(f"{name}: not where or what it should be")
        end = after
