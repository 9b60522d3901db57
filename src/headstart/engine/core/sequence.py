"""A sequence (one request's tokens) and a slot (a place in the KV cache that may outlive it)."""

from __future__ import annotations

from dataclasses import dataclass, field
from dataclasses import replace as copied

from msgspec.structs import replace

from headstart.engine.core.chunking import Chunking
from headstart.engine.grammar import Matcher
from headstart.engine.model import Piece, Sampler
from headstart.protocol import Source, Submit
from headstart.tokens import common_prefix


@dataclass(eq=False, slots=True)
class Slot:
    """`tokens` are those whose KV values it holds. The first `exact` of them have the values that a prefill
    from nothing, alone and cut at `boundary`, gives; later ones were decoded one by one, or in the pool
    beside others (`pooled`), and may differ in the last bits. They were computed for `owner`."""

    id: int
    pooled: bool = False
    tokens: list[int] = field(default_factory=list)
    exact: int = 0
    boundary: int = 0
    last_used: int = 0
    owner: str = ""
    sequence: Sequence | None = None

    def hold(self, tokens: list[int], exact: int, boundary: int) -> None:
        self.tokens, self.exact, self.boundary = tokens, exact, boundary


@dataclass(eq=False, slots=True)
class Sequence:
    """Prompt and generated tokens; evaluation catches up with their number. `reading`: its state is on its
    way into memory; `compiling`: its grammar isn't ready. Times are monotonic seconds, 0 until they happen.
    While its prompt is prefilled it stands for all answers that its request wants."""

    request: Submit
    tokens: list[int]
    arrived: float
    slot: Slot | None = None
    reading: bool = False
    compiling: bool = False
    matcher: Matcher | None = None
    sampler: Sampler | None = None
    computed: int = 0
    cached: int = 0
    evaluated: int = 0
    source: Source = "none"
    last_step: int = 0
    placed: float = 0.0
    restored: float = 0.0
    first_token: float = 0.0

    @property
    def ids(self) -> range:
        """Of the answers it stands for."""
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
        """The sequences of all other answers, which have no place yet; from now on it stands for one."""
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

    def opens_like(self, other: Sequence) -> bool:
        """Whether both begin with the same tokens, and this one could have them from the other."""
        one, boundary = self.request, self.request.boundary
        same = boundary == other.request.boundary and one.tokens[:boundary] == other.request.tokens[:boundary]
        return one.reuse and same and may_share(one.owner, other.request)

    def next_piece(self, cuts: Chunking) -> Piece:
        """What to evaluate next: the one token just generated, or prompt tokens up to the next cut."""
        assert self.slot is not None
        end = len(self.tokens)
        if self.is_prefilling:
            end = cuts.end(self.computed, self.request.boundary, end)
        sample = end == len(self.tokens) and self.request.max_tokens > 0
        return Piece(self.slot.id, self.computed, self.tokens[self.computed : end], sample)


def _answer(request: Submit, number: int) -> Submit:
    sampling = request.sampling
    if sampling.seed is not None:
        sampling = replace(sampling, seed=sampling.seed + number)
    return replace(request, id=request.id + number, n=1, sampling=sampling)


def reusable(slot: Slot, request: Submit, cuts: Chunking, *, can_cut: bool) -> int:
    """How many tokens of the slot the request may start from; at least one of its own is always left.

    What was prefilled is reused up to a place where this request's own prefill would be cut, which makes its
    output the same as without reuse. Decoded tokens are reused too, by a request that continues them, but
    never saved. What can't be cut is reused whole or not at all.
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
    kept = _last_common_cut(min(shared, slot.exact), slot.boundary, request.boundary, cuts)
    return kept if can_cut or kept == len(slot.tokens) else 0


def may_share(owner: str, request: Submit) -> bool:
    """Whether the request may start from its opening as it was computed for `owner`."""
    return owner == request.owner or request.boundary <= request.public


def _last_common_cut(shared: int, held: int, wanted: int, cuts: Chunking) -> int:
    if held == wanted:
        return cuts.last(wanted if shared >= wanted else 0, shared)
    return cuts.last(0, min([shared, *filter(None, (held, wanted))]))
