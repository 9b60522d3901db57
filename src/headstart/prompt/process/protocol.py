"""Messages between the server and a model's prompt process: one page, all frozen.

The first request is `Load`; each request gets one reply. Requests are JSON, since numbers in messages and
tools may have any size; replies are MessagePack.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

Messages = list[dict[str, Any]]


class Load(Struct, frozen=True, tag=True):
    """`template`: the source of a chat template to use instead of the model's own."""

    path: str
    template: str | None = None


class ChatPrompt(Struct, frozen=True, tag=True):
    """A whole prompt; `variables` are further template variables."""

    messages: Messages
    tools: list[dict[str, Any]] = []
    variables: dict[str, Any] = {}


class ChatPrefix(Struct, frozen=True, tag=True):
    """The common prefix of all chats that begin with these messages and tools."""

    messages: Messages
    tools: list[dict[str, Any]] = []


class TextPrompt(Struct, frozen=True, tag=True):
    text: str


class TextPrefix(Struct, frozen=True, tag=True):
    text: str


class Plain(Struct, frozen=True, tag=True):
    """A text by itself, of which nothing is remembered. `first`: with the control tokens that the model adds
    around a prompt; not `special`: control tokens are treated as text."""

    text: str
    first: bool = True
    special: bool = True


Tokenisable = ChatPrompt | ChatPrefix | TextPrompt | TextPrefix | Plain


class Tokenise(Struct, frozen=True, tag=True):
    """Requests the tokens of each item, and those of the `prefix` unless the template refuses it. `can_cut`:
    a state may be used in part."""

    items: list[Tokenisable]
    can_cut: bool
    prefix: ChatPrefix | TextPrefix | None = None


class Render(Struct, frozen=True, tag=True):
    messages: Messages
    tools: list[dict[str, Any]] = []


Request = Load | Tokenise | Render


class Facts(Struct, frozen=True, tag=True):
    """Facts of a model, sent once. `written`: the bytes from which tokens are made, concatenated; `ends`: the
    end of each token's bytes in it, u32 in native byte order. `answer_bytes`: the bytes of tokens in answers,
    if different; control tokens have none. `prefixed`: a space is added before text, only before the first or
    before each that follows one of the tokens `added`. `gap` is as in Tokenizer. `call_format`: the name of
    the template's format of tool calls; `reasons`: the template supports reasoning; `markers`: the markers of
    calls and reasoning that are one token."""

    written: bytes
    ends: bytes
    answer_bytes: dict[int, bytes]
    prefixed: Literal["", "first", "each"]
    added: list[int]
    bos_text: str
    gap: tuple[str, str, str] | None
    template_hash: str
    call_format: str
    reasons: bool
    markers: dict[str, int]


class Tokens(Struct, frozen=True, tag=True):
    lists: list[list[int]]
    prefix: list[int] | None = None


class Rendered(Struct, frozen=True, tag=True):
    text: str


class Refused(Struct, frozen=True, tag=True):
    """The request is refused. `always`: not the request is at fault, but the model's template or file, which
    can't be used."""

    message: str
    param: str | None = None
    always: bool = False


Reply = Facts | Tokens | Rendered | Refused
