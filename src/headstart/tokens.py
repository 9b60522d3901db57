"""Comparison of token lists and of texts."""

from __future__ import annotations

from collections.abc import Sequence


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of leading tokens that `a` and `b`, of the same type, share."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


def common_text(one: str, other: str) -> int:
    """The length of the common prefix, found by bisection: comparing texts is faster than counting."""
    fits, least, most = 0, 0, min(len(one), len(other))
    while least <= most:
        middle = (least + most) // 2
        if one[fits:middle] == other[fits:middle]:
            fits, least = max(fits, middle), middle + 1
        else:
            most = middle - 1
    return fits


def overlap(text: str, other: str) -> int:
    """The length of the longest suffix of `text` that is a prefix of `other`, but not all of it."""
    return next((n for n in range(min(len(text), len(other) - 1), 0, -1) if text.endswith(other[:n])), 0)
