"""What crosses the socket between the server and a model's prompt process: one page, all frozen.

The first request is `Load`; each request is answered by one reply. Requests are JSON, since numbers in
messages and tools may have any size; replies are MessagePack.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

Messages = list[dict[str, Any]]


class Load(Struct, frozen=True, tag=True):
    """`template`: the source of a chat template to use instead of the model's own."""

    path: str
    template: str | None = None


class Chat(Struct, frozen=True, tag=True):
    """A whole prompt; `variables` are what its template is told besides."""

    messages: Messages
    tools: list[dict[str, Any]] = []
    variables: dict[str, Any] = {}


class ChatOpening(Struct, frozen=True, tag=True):
    """What all chats that begin with these messages and tools have in common."""

    messages: Messages
    tools: list[dict[str, Any]] = []


class Text(Struct, frozen=True, tag=True):
    text: str


class TextOpening(Struct, frozen=True, tag=True):
    text: str


class Plain(Struct, frozen=True, tag=True):
    """A text by itself, nothing of which is remembered. `first`: with what the model wants around a prompt;
    not `special`: what looks like a control token is text."""

    text: str
    first: bool = True
    special: bool = True


Wanted = Chat | ChatOpening | Text | TextOpening | Plain


class Tokenise(Struct, frozen=True, tag=True):
    """The tokens of each; of an `opening` besides, unless the template refuses it. `can_cut`: a state may be
    used in part."""

    wanted: list[Wanted]
    can_cut: bool
    opening: ChatOpening | TextOpening | None = None


class Render(Struct, frozen=True, tag=True):
    messages: Messages
    tools: list[dict[str, Any]] = []


Request = Load | Tokenise | Render


class Facts(Struct, frozen=True, tag=True):
    """What is told once. `written`: what each token was made from, all in one, and `ends`: where each one's
    bytes end in it, u32 of this machine. `spoken`: what tokens of an answer stand for where that is another,
    as control tokens stand for nothing. `prefixed`: a space is put before text, before the first only or
    before each that follows one of the tokens `added`. `gap` is as in Tokenizer. `dialect`: by the name of
    the form of calls that the template teaches; `reasons`: it knows reasoning; `markers`: of what marks
    calls and reasoning, what is one token."""

    written: bytes
    ends: bytes
    spoken: dict[int, bytes]
    prefixed: Literal["", "first", "each"]
    added: list[int]
    bos_text: str
    gap: tuple[str, str, str] | None
    template_hash: str
    dialect: str
    reasons: bool
    markers: dict[str, int]


class Tokens(Struct, frozen=True, tag=True):
    lists: list[list[int]]
    opening: list[int] | None = None


class Rendered(Struct, frozen=True, tag=True):
    text: str


class Refused(Struct, frozen=True, tag=True):
    """`always`: it isn't the request that is wrong, the model's template or file can't be used."""

    message: str
    param: str | None = None
    always: bool = False


Reply = Facts | Tokens | Rendered | Refused
