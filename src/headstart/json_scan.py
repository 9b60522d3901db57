"""Measures untrusted JSON by its bytes, before it is parsed: depth and numbers of values."""

from __future__ import annotations

from itertools import accumulate

from headstart.limits import MAX_CONTAINERS, MAX_DEPTH, MAX_STRINGS, MAX_VALUES

_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEPS = [(byte in b"[{") - (byte in b"]}") for byte in range(256)]


class JsonScan:
    """Measures a JSON text that arrives in pieces. In invalid JSON it measures at least the part that a
    parser would read before the error. A piece takes about as long as parsing it, whatever it contains; no
    recursion."""

    def __init__(self) -> None:
        self.depth = 0
        self.containers = 0
        self.strings = 0
        self.values = 0
        self._in_string = False
        self._held = b""

    def feed(self, piece: bytes) -> None:
        """Raises ValueError, which names the exceeded limit, as soon as one is exceeded."""
        outside = self._outside_strings(piece)
        brackets = outside.translate(None, _NOT_BRACKETS)
        self.values += outside.count(b",")
        self.containers += brackets.count(b"[") + brackets.count(b"{")
        for n, most, what in (
            (self.strings, MAX_STRINGS, "strings"),
            (self.containers, MAX_CONTAINERS, "objects and lists"),
            (self.values, MAX_VALUES, "values"),
        ):
            if n > most:
                raise ValueError(f"has more than {most} {what}")
        heights = list(accumulate(map(_STEPS.__getitem__, brackets), initial=self.depth))
        if max(heights) > MAX_DEPTH:
            raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")
        self.depth = heights[-1]

    def _outside_strings(self, piece: bytes) -> bytes:
        piece = self._held + piece
        # A trailing backslash escapes the next piece's first byte, unless it is escaped itself.
        cut = len(piece) - (len(piece) - len(piece.rstrip(b"\\"))) % 2
        piece, self._held = piece[:cut], piece[cut:]
        if b"\\" in piece:
            piece = piece.replace(rb"\\", b"").replace(rb"\"", b"")
        quotes = piece.count(b'"')
        self.strings += (quotes + self._in_string) // 2
        if self.strings > MAX_STRINGS:
            return b""
        outside = b"".join(piece.split(b'"')[self._in_string :: 2])
        self._in_string ^= quotes % 2 == 1
        return outside


def check_json(text: str | bytes) -> None:
    """Raises ValueError for a JSON text that is too deep or has too many values."""
    JsonScan().feed(text.encode(errors="surrogatepass") if isinstance(text, str) else text)


def depth(value: object) -> int:
    """The nesting depth of lists and objects in a parsed value; 0 for a value that is neither."""
    found, level = 0, [value]
    while level := [each for each in level if isinstance(each, list | dict)]:
        found += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return found


def is_deeper(text: bytes, most: int) -> bool:
    """Whether JSON text is nested more than `most` levels deep; in invalid JSON, as far as a parser reads
    it."""
    outside = b"".join(text.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])
    brackets = outside.translate(None, _NOT_BRACKETS)
    return max(accumulate(map(_STEPS.__getitem__, brackets), initial=0)) > most
