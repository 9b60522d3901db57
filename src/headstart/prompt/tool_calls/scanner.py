"""Finds the end of bracketed text that arrives in pieces, and parses objects that call a function."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

from headstart.json_scan import check_json

# Possible first keys of an object that calls a function.
KEYS = ("name", "arguments", "parameters", "type", "function", "id")
FIRST_KEY = re.compile(r'\s*\{\s*"([^"\\]*)"')
# An object in the usual order of keys, up to where its arguments begin.
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


class BracketEnd:
    """Counts brackets outside strings; doesn't check the text between them. `depth`: the number of open
    ones."""

    opening, closing, quotes = "{[", "}]", '"'

    def __init__(self, depth: int = 0) -> None:
        self.depth = depth
        self.quote = ""
        self.escaped = False

    def find(self, text: str) -> int | None:
        """The number of characters of `text`, which continues the last one, that belong to the value; None if
        all do and the value is incomplete."""
        for at, character in enumerate(text):
            if self._ends(character):
                return at + 1
        return None

    def _ends(self, character: str) -> bool:
        if self.quote:
            if character == self.quote and not self.escaped:
                self.quote = ""
            self.escaped = character == "\\" and not self.escaped
        elif character in self.quotes:
            self.quote = character
        elif character in self.opening:
            self.depth += 1
        elif character in self.closing:
            self.depth -= 1
            return self.depth <= 0
        return False


@dataclass(frozen=True)
class CallHead:
    """The start of a call; its arguments begin after `size` characters. `arguments`: the whole arguments, if
    the call was parsed completely and ends there."""

    name: str
    size: int
    arguments: str | None = None


def may_begin_call(text: str) -> bool:
    """Whether an object that calls a function may begin like this."""
    start = text.lstrip()
    if not start:
        return True
    if start[0] != "{":
        return False
    rest = start[1:].lstrip()
    if found := FIRST_KEY.match(start):
        return found[1] in KEYS
    return not rest or (rest[0] == '"' and any(key.startswith(rest[1:]) for key in KEYS))


class ObjectReader:
    """Parses the object at the beginning of a growing text."""

    def __init__(self) -> None:
        self._end = BracketEnd()
        self._scanned = 0

    def read(self, text: str) -> CallHead | None:
        """The start of the call; None if more text is needed. Raises ValueError if it isn't a call. `text`
        must extend the text of the last call."""
        if not may_begin_call(text):
            raise ValueError("not an object that calls a function")
        if found := HEAD.match(text):
            return CallHead(str(_decoded(found[1])), found.end())
        size = self._end.find(text[self._scanned :])
        if size is None:
            self._scanned = len(text)
            return None
        size += self._scanned
        return _whole(_decoded(text[:size]), size)


def _decoded(text: str) -> Any:
    """Raises ValueError."""
    check_json(text)
    return msgspec.json.decode(text)


def _whole(call: Any, size: int) -> CallHead:
    """The call in an object whose keys are in another order. Raises ValueError."""
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    name = isinstance(call, dict) and (call.get("name") or call.get("function"))
    if not isinstance(name, str):
        raise ValueError("it names no function")
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _decoded(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("its arguments are no object")
    return CallHead(name, size, encoded(arguments))


def encoded(arguments: dict[str, Any]) -> str:
    """The arguments as JSON. Raises ValueError."""
    try:
        return msgspec.json.encode(arguments).decode()
    except (TypeError, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error
