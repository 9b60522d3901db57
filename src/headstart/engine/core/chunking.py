"""Cuts prefill into chunks: at the same places, whether a prefix was computed or restored.

llama.cpp's results may differ in the last bits with the number of tokens in a batch. So the cuts are a
function of the position alone, not of other load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SMALLEST = 4
# A checkpoint is made at the first cut after each so many tokens.
CHECKPOINT_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Chunking:
    """Chunks of `chunk` tokens, halved (down to 4) until one takes at most `longest_ms`. The assumed cost of
    n tokens after d others is pass_ms + n * (token_ms + (d + n) * attend_ms)."""

    chunk: int
    longest_ms: float = float("inf")
    pass_ms: float = 0.0
    token_ms: float = 0.0
    attend_ms: float = 0.0

    def cost(self, start: int, n_tokens: int) -> float:
        """Milliseconds for prefilling `n_tokens` tokens after `start` others."""
        return self.pass_ms + n_tokens * (self.token_ms + (start + n_tokens) * self.attend_ms)

    def size(self, start: int) -> int:
        size = self.chunk
        while size >= 2 * SMALLEST and self.cost(start, size) > self.longest_ms:
            size //= 2
        return size

    def end(self, start: int, boundary: int, end: int) -> int:
        """The end of the chunk that starts at `start`: on a grid counted from 0 before the boundary and from
        the boundary after it, and never across the boundary or `end`."""
        base, limit = (0, min(boundary, end)) if start < boundary else (boundary, end)
        size = self.size(start)
        return min(base + ((start - base) // size + 1) * size, limit)

    def cuts(self, boundary: int, n_tokens: int) -> list[int]:
        """The ends of all chunks of a prefill of `n_tokens` tokens."""
        found, at = [], 0
        while at < n_tokens:
            at = self.end(at, boundary, n_tokens)
            found.append(at)
        return found

    def last(self, base: int, limit: int) -> int:
        """The last cut at or before `limit` of a prefill that begins at `base`."""
        at = base
        while (following := self.end(at, base, limit + self.chunk)) <= limit:
            at = following
        return at


def checkpoints(cuts: Sequence[int], boundary: int, *, generates: bool) -> dict[int, bool]:
    """The cuts at which prefill makes a checkpoint, and whether each is in a regular place: the boundary, and
    one every CHECKPOINT_TOKENS. Before an answer, the last cut but the prompt's end is another, from which
    the same prompt can be answered again."""
    places = dict.fromkeys(cuts[-2:-1], False) if generates else {}
    for before, cut in zip((0, *cuts), cuts, strict=False):
        if cut == boundary or cut // CHECKPOINT_TOKENS > before // CHECKPOINT_TOKENS:
            places[cut] = True
    return places
