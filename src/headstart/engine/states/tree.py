"""Finds the longest stored prefix of a prompt, by the tokens of blocks."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from headstart.engine.states.block import Block
from headstart.engine.states.held import Segment
from headstart.tokens import common_prefix


@dataclass(frozen=True, slots=True)
class Lookup:
    """A prompt to find a stored prefix of: at most `limit` of its `tokens`, for `owner`, who may use the
    blocks of others for the first `public` tokens. `cuts`: where the prompt's own prefill would be cut, as in
    Block. `exact`: only values that were prefilled. `whole`: the model's states can't be shortened, and are
    usable where there is a checkpoint."""

    tokens: array[int]
    limit: int
    owner: str
    public: int
    cuts: Sequence[int]
    exact: bool = False
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Match:
    """The first `n_tokens` of the tokens on the path to `block`. The first `n_exact` of them are exact with
    the cuts of the prompt that was looked up."""

    block: Block
    n_tokens: int
    n_exact: int

    @property
    def blocks(self) -> list[Block]:
        return self.block.path()

    @property
    def in_memory(self) -> bool:
        whole = all(block.in_memory for block in self.blocks)
        return whole and not (self.block.n_checkpoint and self.block.checkpoint is None)


@dataclass(frozen=True, slots=True)
class _Walk:
    """Tokens up to `block`'s end match; `n_exact` is the last common cut. `is_exact`: all values so far are
    exact; `cuts_agree`: up to here all cuts are common."""

    block: Block
    n_exact: int = 0
    n_cuts: int = 0
    is_exact: bool = True
    cuts_agree: bool = True


def longest(root: Block, lookup: Lookup) -> Match | None:
    """The match with the most tokens, or None if nothing matches.

    Exact values are used up to the last place where both prefills are cut, and all cuts before it are common:
    so the prompt's output is the same as without them. A prompt that continues decoded values uses them, and
    all before them, as far as its tokens are the same."""
    best: Match | None = None
    waiting = [_Walk(root)]
    while waiting:
        walk = waiting.pop()
        for child in walk.block.children:
            found, further = _step(walk, child, lookup)
            if further:
                waiting.append(further)
            if found and (best is None or _rank(found) > _rank(best)):
                best = found
    return best


def _rank(match: Match) -> tuple[int, int, bool]:
    return match.n_tokens, match.n_exact, match.block.in_memory


def _step(walk: _Walk, child: Block, lookup: Lookup) -> tuple[Match | None, _Walk | None]:
    """The match that ends in the child, and the walk that goes on after it."""
    start, end = child.start, child.end
    limit = lookup.limit if child.owner == lookup.owner else min(lookup.limit, lookup.public)
    if start >= limit or lookup.tokens[start] != child.tokens[0]:
        return None, None
    matched = start + common_prefix(child.tokens, lookup.tokens[start : min(end, limit)])
    if child.cuts is None and lookup.exact:
        return None, None
    n_exact, n_cuts, agree = walk.n_exact, walk.n_cuts, walk.cuts_agree
    if child.cuts is None:
        agree = False
    for cut in child.cuts or ():
        agree = agree and n_cuts < len(lookup.cuts) and lookup.cuts[n_cuts] == cut
        if not agree or abs(cut) > matched:
            break
        n_exact, n_cuts = abs(cut), n_cuts + 1
    is_exact = walk.is_exact and child.cuts is not None
    further = _Walk(child, n_exact, n_cuts, is_exact, agree) if matched == end < limit else None
    return _usable(child, matched, n_exact, is_exact, lookup), further


def _usable(block: Block, matched: int, n_exact: int, is_exact: bool, lookup: Lookup) -> Match | None:
    n_tokens = min(matched, n_exact) if is_exact else matched
    if lookup.whole and not (n_tokens == block.end and block.has_checkpoint):
        return None
    if lookup.whole and is_exact and block.cuts and block.cuts[-1] > 0:
        # The prompt's own prefill would make no checkpoint here, and go on from the state as computed.
        return None
    return Match(block, n_tokens, min(n_exact, n_tokens)) if n_tokens > block.start else None


def same_block(parent: Block, segment: Segment, tokens: array[int]) -> Block | None:
    """The block after `parent` that has the exact values of a segment of `tokens`."""
    if segment.cuts is None:
        return None
    for child in parent.children:
        same = child.cuts == segment.cuts and child.owner == segment.owner
        if same and child.tokens == tokens[segment.start : segment.end]:
            return child
    return None
