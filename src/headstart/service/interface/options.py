"""Parameters of a generation request besides its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from headstart.prompt.chat import Variables
from headstart.protocol import Sampling


@dataclass(frozen=True)
class Calling:
    """`none`: calls are text; `required`: the answer is a call, of the function `name` where there is one.
    `parallel`: there may be several calls. `reasoning`: it is told apart from the text."""

    choice: Literal["none", "auto", "required"] = "auto"
    name: str | None = None
    parallel: bool = True
    reasoning: bool = True


@dataclass(frozen=True)
class Breakpoint:
    """The chat up to here is to be kept for `ttl_seconds` after its last use: its first `messages` messages,
    of the last of them `characters` characters. Its tools always belong to it, since templates write them at
    the start."""

    messages: int
    characters: int
    ttl_seconds: float


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
    marks: Sequence[Breakpoint] = ()
    given: frozenset[str] = frozenset()
