"""What a request asks for, and what the engine is to be sent for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headstart.caches.entry import Entry
from headstart.prompt.answer_parts import Parser, PlainText
from headstart.prompt.chat import Variables
from headstart.protocol import Sampling, Submit
from headstart.service.automatic import Unnamed
from headstart.service.calling import Calling
from headstart.service.conversations import Saving
from headstart.service.explanation import Closest
from headstart.service.marks import Mark, Marked
from headstart.service.model import ServedModel
from headstart.service.opening import Opening


@dataclass(frozen=True)
class Options:
    """What a request says besides its prompt. `max_tokens` None: to the end of the context. `reuse` False:
    every prompt token is evaluated, nothing is taken from a cache or an earlier request. `use_cache`: the
    caches to start from, in their order, or none. `save_as`: the name under which a chat is kept once it is
    answered; for `overwrite` see Saving. `explain`: the result is to say why it started from a cache or
    didn't. `n`: how many answers. `variables`: what a chat's template is told besides. `whole`: the chat has
    in its messages what it shares with the cache. `marks`: up to where a chat is to be kept, if it names no
    cache. `given`: the names of the parameters by which it asks for something."""

    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    use_cache: tuple[str, ...] | None = None
    reuse: bool = True
    save_as: str | None = None
    overwrite: bool | None = None
    explain: bool = False
    n: int = 1
    calling: Calling = field(default_factory=Calling)
    variables: Variables = field(default_factory=dict)
    whole: bool = False
    marks: Sequence[Mark] = ()
    given: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Prepared:
    """A request ready for the engine. `names`: the caches it names, of which `entry` is made. `unnamed`: what
    it begins with, where it is a chat that names none. `parser` makes what reads one of its answers, whose
    tokens stand for what `piece` says; None: for their text. `warning`: how it is answered otherwise than
    asked."""

    model: ServedModel
    submit: Submit
    stop: Sequence[str]
    entry: Entry | None = None
    opening: Opening = field(default_factory=lambda: Opening(0))
    names: Sequence[str] = ()
    unnamed: Unnamed | None = None
    saving: Saving | None = None
    matched: int = 0
    explain: bool = False
    closest: Closest | None = None
    parser: Callable[[], Parser] = PlainText
    piece: Callable[[int], bytes] | None = None
    marked: Marked | None = None
    warning: str = ""
