"""How deep JSON is, told without recursion, so that no depth is too much to be told."""

from __future__ import annotations

OPENING = ord("[")
BRACKETS = bytes.maketrans(b"{}", b"[]")
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def depth(value: object) -> int:
    """How many lists and objects lie within each other in what was parsed; 0 for what is neither."""
    found, level = 0, [value]
    while level := [each for each in level if isinstance(each, list | dict)]:
        found += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return found


def is_deeper(text: bytes, most: int) -> bool:
    """Whether more than `most` lists and objects are open at once in JSON text. Where that isn't JSON, as far
    as a parser reads it."""
    level, quoted = 0, False
    for part in text.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"'):
        for bracket in b"" if quoted else part.translate(BRACKETS, NOT_BRACKETS):
            level += 1 if bracket == OPENING else -1
            if level > most:
                return True
        quoted = not quoted
    return False
