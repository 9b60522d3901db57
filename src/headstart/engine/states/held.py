"""The state that a slot holds, and its division into blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from headstart.engine.states.block import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The part of a state that belongs to one position alone. `lasting`: it is in a regular place, and may be
    written to the disk."""

    data: memoryview
    lasting: bool


@dataclass(frozen=True, slots=True)
class Held:
    """The state that a slot holds: `tokens`, of which the first `exact` are exact, prefilled with `cuts`.
    Everybody may use the first `public` tokens, `owner` the others. `checkpoints`: those at positions before
    the end."""

    tokens: Sequence[int]
    exact: int
    cuts: Sequence[int]
    owner: str = ""
    public: int = 0
    to_disk: bool = True
    checkpoints: Mapping[int, Checkpoint] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Segment:
    """The tokens of one block, from `start` to `end`; `cuts` and `owner` as in Block."""

    start: int
    end: int
    cuts: tuple[int, ...] | None
    owner: str


def segments(held: Held, start: int) -> Iterator[Segment]:
    """Divides what is held from `start` on into blocks: exact ones end where prefill was cut, and all end
    where there is a checkpoint, or where the public part ends."""
    places = {*held.checkpoints, held.public}
    cuts: list[int] = []
    for cut in (cut for cut in held.cuts if start < abs(cut) <= held.exact):
        if cuts and abs(cut) - start > BLOCK_TOKENS:
            yield _exact(held, start, cuts)
            start, cuts = abs(cuts[-1]), []
        cuts.append(cut)
        if abs(cut) in places:
            yield _exact(held, start, cuts)
            start, cuts = abs(cut), []
    if cuts:
        yield _exact(held, start, cuts)
        start = abs(cuts[-1])
    n_tokens = len(held.tokens)
    while start < n_tokens:
        following = (place for place in places if start < place < n_tokens)
        end = min(start + BLOCK_TOKENS, n_tokens, *following)
        yield Segment(start, end, None, _owner(held, end))
        start = end


def _exact(held: Held, start: int, cuts: Sequence[int]) -> Segment:
    end = abs(cuts[-1])
    return Segment(start, end, tuple(cuts), _owner(held, end))


def _owner(held: Held, end: int) -> str:
    return "" if end <= held.public else held.owner
