"""The common part of the parsers of all tool-call formats.

Text is parsed by states: methods that take text from `buffer` and return its parts, or None if they need
more. Each decides at the first character that allows it, so the result doesn't depend on how the text was
split. Before its arguments begin, a malformed call is returned as text. After that it is a call: the text up
to the closing bracket is its arguments, whether or not it is JSON.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Collection

from headstart.prompt.answer_parts import AnswerPart, CallDelta
from headstart.prompt.tool_calls.scanner import BracketEnd, CallHead, ObjectReader
from headstart.tokens import overlap

ParserState = Callable[[], "list[AnswerPart] | None"]
ID_CHARACTERS = string.ascii_letters + string.digits


def new_id() -> str:
    return "call_" + "".join(secrets.choice(ID_CHARACTERS) for _ in range(24))


class CallParser:
    """`names`: the known functions; a call of another one is text. `most`: the maximum number of calls; the
    rest is text. `markers`: texts that begin a call; white space around calls is dropped."""

    markers: tuple[str, ...] = ()

    def __init__(self, names: Collection[str], most: int | None = None) -> None:
        self.names = names
        self.most = most
        self.n_calls = 0
        self.buffer = ""
        # No more text will follow.
        self.ending = False
        # Text to return if it turns out to be no call.
        self.opening = ""
        self.after_call = False
        self.object = ObjectReader()
        self.end_of_brackets = BracketEnd()
        self.n_scanned = 0
        self.state: ParserState = self.read_text
        self.after_arguments: ParserState = self.rest_of_object

    def add(self, text: str) -> list[AnswerPart]:
        self.buffer += text
        return self._read()

    def end(self) -> list[AnswerPart]:
        self.ending = True
        return self._read()

    def _read(self) -> list[AnswerPart]:
        parts: list[AnswerPart] = []
        while (read := self.state()) is not None:
            parts += read
        return parts

    # States

    def read_text(self) -> list[AnswerPart] | None:
        if self.after_call:
            self.buffer = self.buffer.lstrip()
            self.after_call = not self.buffer
        places = [(at, marker) for marker in self.markers if (at := self.buffer.find(marker)) >= 0]
        if places and not self.full:
            at, marker = min(places)
            before = self.buffer[:at]
            text = before.rstrip()
            self.opening = before[len(text) :] + marker
            self.buffer = self.buffer[at + len(marker) :]
            self.begin_call()
            return text_part(text)
        size = len(self.buffer) if self.ending or self.full else self._decided_size()
        text, self.buffer = self.buffer[:size], self.buffer[size:]
        return text_part(text) if text else None

    def read_arguments(self) -> list[AnswerPart] | None:
        if not self.buffer:
            return None
        size = self.end_of_brackets.find(self.buffer)
        if size is None:
            size = len(self.buffer)
        else:
            self.state = self.after_arguments
        fragment, self.buffer = self.buffer[:size], self.buffer[size:]
        return [AnswerPart(call=CallDelta(self.n_calls - 1, arguments=fragment))]

    def read_head(self) -> list[AnswerPart] | None:
        """A state: the object that calls a function, up to its arguments."""
        try:
            head = self.object.read(self.buffer)
        except ValueError:
            return self.give_back()
        if head is None:
            return self.give_back() if self.ending else None
        if head.name not in self.names or self.full:
            return self.give_back()
        self.buffer = self.buffer[head.size :]
        return self.announce(head)

    def rest_of_object(self) -> list[AnswerPart] | None:
        """A state: after the arguments. A missing bracket is accepted."""
        rest = self.buffer.lstrip()
        if not rest:
            return None
        if rest[0] == ",":
            self.end_of_brackets = BracketEnd(depth=1)
            self.n_scanned = 0
            self.state = self.other_keys
            return []
        self.buffer = rest.removeprefix("}")
        self.state = self.after_object
        return []

    def other_keys(self) -> list[AnswerPart] | None:
        """A state: other keys of the object, which are ignored once it ends."""
        size = self.end_of_brackets.find(self.buffer[self.n_scanned :])
        if size is None:
            self.n_scanned = len(self.buffer)
            return self.end_call() if self.ending else None
        self.buffer = self.buffer[self.n_scanned + size :]
        self.state = self.after_object
        return []

    # For the formats

    @property
    def full(self) -> bool:
        return self.most is not None and self.n_calls >= self.most

    def begin_call(self) -> None:
        """Called after a marker was found and taken from `buffer`."""
        self.begin_object()

    def after_object(self) -> list[AnswerPart] | None:
        """A state: an object that called a function has ended."""
        return self.end_call()

    def begin_object(self) -> None:
        self.object = ObjectReader()
        self.after_arguments = self.rest_of_object
        self.state = self.read_head

    def announce(self, head: CallHead) -> list[AnswerPart]:
        """The first delta of a call; the arguments follow, or the text after them."""
        call = CallDelta(self.n_calls, self.new_id(), head.name, head.arguments or "")
        self.n_calls += 1
        self.opening = ""
        self.end_of_brackets = BracketEnd()
        self.state = self.read_arguments if head.arguments is None else self.after_object
        return [AnswerPart(call=call)]

    def new_id(self) -> str:
        return new_id()

    def give_back(self) -> list[AnswerPart]:
        """Returns the beginning of a malformed call as text; the text after it is parsed as usual."""
        text, self.opening = self.opening, ""
        self.state = self.read_text
        return text_part(text)

    def end_call(self) -> list[AnswerPart]:
        self.after_call = True
        self.state = self.read_text
        return []

    def skip(self, text: str) -> bool | None:
        """Takes `text` and white space before it from `buffer`. Returns whether it is there; None if that is
        still undecided. Text cut off at the end of the answer counts as there."""
        rest = self.buffer.lstrip()
        if rest.startswith(text):
            self.buffer = rest[len(text) :]
            return True
        if not text.startswith(rest):
            return False
        if self.ending:
            self.buffer = ""
        return True if self.ending else None

    def _decided_size(self) -> int:
        """The number of characters of `buffer` that are text, whatever follows."""
        undecided = max((overlap(self.buffer, marker) for marker in self.markers), default=0)
        size = len(self.buffer) - undecided
        return len(self.buffer[:size].rstrip())


def text_part(text: str) -> list[AnswerPart]:
    return [AnswerPart(text=text)] if text else []
