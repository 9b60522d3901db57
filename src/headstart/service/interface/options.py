"""Parameters of a generation request, other than its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from headstart.prompt.chat import Variables
from headstart.protocol import Sampling


@dataclass(frozen=True)
class Calling:
    """How tools may be called. `none`: calls are text; `required`: the answer is a call, of the function
    `name` if given. `parallel`: several calls are allowed. `reasoning`: reasoning is separated from the
    text."""

    choice: Literal["none", "auto", "required"] = "auto"
    name: str | None = None
    parallel: bool = True
    reasoning: bool = True


@dataclass(frozen=True)
class Breakpoint:
    """A position up to which the chat is cached, for `ttl_seconds` after the last use: the first `messages`
    messages, with `characters` characters of the last one, 0 for none of its text. Tools are always included,
    since templates write them at the start."""

    messages: int
    characters: int
    ttl_seconds: float


@dataclass(frozen=True)
class AnswerGrammar:
    """The grammar that the whole answer must match, and the request's field that asked for it."""

    text: str
    param: str


@dataclass(frozen=True)
class Keep:
    """Store the chat with its answer as the cache `name`. `overwrite` None: it may replace a conversation,
    but no other cache.

    `body`: returns the body of a response, which is stored with the chat; it is called once the result was
    consumed. `caches` and `n_cached`: if the response continues another, the caches that the first one named,
    and how many messages they are; None: those of this request."""

    name: str
    overwrite: bool | None = None
    body: Callable[[], dict[str, Any]] | None = None
    caches: Sequence[str] | None = None
    n_cached: int = 0


@dataclass(frozen=True)
class Options:
    """Parameters of a request. `max_tokens` None: up to the end of the context. `reuse` False: all prompt
    tokens are evaluated, none taken from a cache or an earlier request. `use_cache`: the caches to start
    from, in this order, or none. `keep`: how to store a chat after its answer, if at all. `explain`: the
    result explains why the request started from a cache or didn't. `n`: number of answers. `grammar`: what
    the answer must match. `variables`: further variables of the chat template. `whole`: the messages include
    the cached prefix. `breakpoints`: breakpoints of a chat that names no cache. `count_reasoning`: the result
    has the number of reasoning tokens. `progress`: the events have PromptProgress. `given`: names of
    parameters set to a non-default value."""

    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    use_cache: tuple[str, ...] | None = None
    reuse: bool = True
    keep: Keep | None = None
    explain: bool = False
    n: int = 1
    grammar: AnswerGrammar | None = None
    calling: Calling = field(default_factory=Calling)
    variables: Variables = field(default_factory=dict)
    whole: bool = False
    breakpoints: Sequence[Breakpoint] = ()
    count_reasoning: bool = False
    progress: bool = False
    given: frozenset[str] = frozenset()
