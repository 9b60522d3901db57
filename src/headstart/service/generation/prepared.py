"""A prepared request: what is sent to the engine, and how its answers are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headstart.caches.entry import Entry
from headstart.prompt.answer_parts import Parser, PlainText
from headstart.protocol import Submit
from headstart.service.caching.lookup import Start
from headstart.service.generation.explain import Closest
from headstart.service.models.model import ServedModel
from headstart.service.origins.automatic import ImplicitMatch
from headstart.service.origins.breakpoints import BreakpointPlan
from headstart.service.origins.conversations import Saving


@dataclass(frozen=True)
class Prepared:
    """A request ready for the engine. `names`: the caches it names; `entry` is that cache or their
    combination. `unnamed`: the implicit match of a chat that names no cache. `parser` creates the parser of
    one answer. `piece`: the bytes of a token for that parser; None: those of its text. `warning`: how the
    answer differs from the request."""

    model: ServedModel
    submit: Submit
    stop: Sequence[str]
    entry: Entry | None = None
    opening: Start = field(default_factory=lambda: Start(0))
    names: Sequence[str] = ()
    unnamed: ImplicitMatch | None = None
    saving: Saving | None = None
    matched: int = 0
    explain: bool = False
    closest: Closest | None = None
    parser: Callable[[], Parser] = PlainText
    piece: Callable[[int], bytes] | None = None
    marked: BreakpointPlan | None = None
    warning: str = ""
