"""A sequence (one request's tokens) and a slot (a place in the KV cache that may outlive it)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from dataclasses import replace as copied
from typing import TYPE_CHECKING

from msgspec.structs import replace

from headstart.engine.core.chunking import Chunking
from headstart.engine.model import Piece, Sampler
from headstart.protocol import Forget, Source, Submit
from headstart.tokens import common_prefix

if TYPE_CHECKING:
    from headstart.engine.matcher import Matcher
    from headstart.engine.states.block import Block
    from headstart.engine.states.held import Checkpoint
    from headstart.engine.states.tree import Lookup, Match


@dataclass(eq=False, slots=True)
class Slot:
    """`tokens`: the tokens whose KV values the slot holds, computed for `owner`. The first `exact` of them
    have the values of a prefill from nothing, alone and cut at `boundary`; later ones were decoded one by
    one, or computed together with others in the pool (`pooled`), and may differ in the last bits. `cuts`:
    where the exact ones were cut, as in Block.

    Everybody may use the first `public` tokens. `parked`: the block of the state store up to which the state
    is stored already. `checkpoints`: those made since, by position. `to_disk`: the state may be written.
    `keeps`: it may be parked at all. `is_forgotten`: its state is to be removed when its sequence ends."""

    id: int
    pooled: bool = False
    tokens: list[int] = field(default_factory=list)
    exact: int = 0
    boundary: int = 0
    cuts: list[int] = field(default_factory=list)
    last_used: int = 0
    owner: str = ""
    public: int = 0
    parked: Block | None = None
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)
    to_disk: bool = True
    keeps: bool = True
    is_forgotten: bool = False
    sequence: Sequence | None = None

    def hold(
        self,
        tokens: list[int],
        exact: int,
        boundary: int,
        cuts: Iterable[int] = (),
        parked: Block | None = None,
    ) -> None:
        self.tokens, self.exact, self.boundary = tokens, exact, boundary
        self.cuts = [cut for cut in cuts if abs(cut) <= exact]
        self.parked = parked.at_most(len(tokens)) if parked else None
        self.checkpoints = {at: part for at, part in self.checkpoints.items() if at <= len(tokens)}

    def clear(self) -> None:
        """Records that the slot holds nothing any more."""
        self.hold([], 0, 0)
        self.keeps, self.is_forgotten = True, False

    def begin(self, request: Submit, cuts: list[int]) -> None:
        """Records that a request goes on from what the slot holds, its own prefill being cut at `cuts`."""
        agreed = 0
        for own, cut in zip(self.cuts, cuts, strict=False):
            if own != cut:
                break
            agreed = abs(cut)
        self.exact = min(self.exact, agreed)
        self.cuts = [cut for cut in self.cuts if abs(cut) <= self.exact]
        self.boundary, self.public, self.keeps = request.boundary, request.public, True

    @property
    def n_parked(self) -> int:
        """The number of tokens whose values are in the state store."""
        return self.parked.at_most(len(self.tokens)).end if self.parked else 0


@dataclass(eq=False, slots=True)
class Sequence:
    """Prompt and generated tokens; evaluation catches up with their number. `reading`: its state is being
    read into memory; `awaited`: the match whose blocks are, or were; `compiling`: its grammar is being
    compiled. `lookup`: its prompt, as the state store is asked for it. `cuts`: where its prefill is cut, as
    in Block; `checkpoints`: where that makes checkpoints, as in `chunking`. Times are monotonic seconds, 0
    until they happen. During prefill it stands for all answers of its request."""

    request: Submit
    tokens: list[int]
    arrived: float
    slot: Slot | None = None
    reading: bool = False
    awaited: Match | None = None
    lookup: Lookup | None = None
    compiling: bool = False
    matcher: Matcher | None = None
    sampler: Sampler | None = None
    computed: int = 0
    cached: int = 0
    evaluated: int = 0
    source: Source = "none"
    restored_bytes: int = 0
    cuts: list[int] = field(default_factory=list)
    checkpoints: dict[int, bool] = field(default_factory=dict)
    last_step: int = 0
    placed: float = 0.0
    restored: float = 0.0
    first_token: float = 0.0

    @property
    def ids(self) -> range:
        """The ids of the answers that the sequence stands for."""
        return range(self.request.id, self.request.id + self.request.n)

    @property
    def n_prompt(self) -> int:
        return len(self.request.tokens)

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def may_start(self) -> bool:
        return not (self.reading or self.compiling)

    @property
    def is_prefilling(self) -> bool:
        return self.computed < self.n_prompt

    def divide(self) -> list[Sequence]:
        """Returns sequences, without slots, for all other answers; this one then stands for a single
        answer."""
        whole = self.request
        if whole.n == 1:
            return []
        requests = [_answer(whole, number) for number in range(whole.n)]
        self.request = requests[0]
        return [
            copied(
                self,
                request=request,
                tokens=self.tokens.copy(),
                slot=None,
                cached=self.n_prompt,
                evaluated=0,
                source="slot",
                matcher=self.matcher and self.matcher.copy(),
            )
            for request in requests[1:]
        ]

    def shares_prefix_with(self, other: Sequence) -> bool:
        """Whether both have the same cached prefix, and the other may use this one's values for it."""
        one, boundary = self.request, self.request.boundary
        same = boundary == other.request.boundary and one.tokens[:boundary] == other.request.tokens[:boundary]
        return one.reuse and same and may_share(one.owner, other.request)

    def next_piece(self, chunking: Chunking) -> Piece:
        """The tokens to evaluate next: the one just generated, or prompt tokens up to the next cut."""
        assert self.slot is not None
        end = len(self.tokens)
        if self.is_prefilling:
            end = chunking.end(self.computed, self.request.boundary, end)
        sample = end == len(self.tokens) and self.request.max_tokens > 0
        return Piece(self.slot.id, self.computed, self.tokens[self.computed : end], sample)


def _answer(request: Submit, number: int) -> Submit:
    sampling = request.sampling
    if sampling.seed is not None:
        sampling = replace(sampling, seed=sampling.seed + number)
    return replace(request, id=request.id + number, n=1, sampling=sampling)


def reusable(slot: Slot, request: Submit, chunking: Chunking, *, can_cut: bool) -> int:
    """The number of the slot's tokens from which the request may start; it always evaluates at least one
    token.

    Prefilled tokens are reused up to a place where the request's own prefill would be cut, so that its output
    is the same as without reuse. A request that continues decoded tokens reuses them too, but never saves
    them. A state that can't be cut is reused whole or not at all.
    """
    if not request.reuse:
        return 0
    shared = min(common_prefix(slot.tokens, request.tokens), len(request.tokens) - 1)
    if slot.owner != request.owner:
        shared = min(shared, request.public)
    if not can_cut and shared < len(slot.tokens):
        return 0
    if shared > slot.exact and not request.save_to:
        return shared
    kept = _last_common_cut(min(shared, slot.exact), slot.boundary, request.boundary, chunking)
    return kept if can_cut or kept == len(slot.tokens) else 0


def continues(tokens: list[int], forgotten: Forget) -> bool:
    """Whether the tokens go on with those that are to be forgotten, beyond what is kept of them."""
    if forgotten.tokens is None:
        return bool(tokens)
    kept = max((common_prefix(each, forgotten.tokens) for each in forgotten.kept), default=0)
    return common_prefix(tokens, forgotten.tokens) > kept


def may_share(owner: str, request: Submit) -> bool:
    """Whether the request may use a state of its cached prefix that was computed for `owner`."""
    return owner == request.owner or request.boundary <= request.public


def _last_common_cut(shared: int, slot_boundary: int, boundary: int, chunking: Chunking) -> int:
    if slot_boundary == boundary:
        return chunking.last(boundary if shared >= boundary else 0, shared)
    return chunking.last(0, min([shared, *filter(None, (slot_boundary, boundary))]))
