"""Comparison of token lists and of texts."""

from __future__ import annotations

from collections.abc import Sequence


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of leading tokens that `a` and `b`, of the same type, share."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


def overlap(text: str, other: str) -> int:
    """The length of the longest suffix of `text` that is a prefix of `other`, but not all of it."""
    return next((n for n in range(min(len(text), len(other) - 1), 0, -1) if text.endswith(other[:n])), 0)
