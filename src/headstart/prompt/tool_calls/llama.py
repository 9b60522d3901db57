"""Calls in the format of Llama 3: an object that is the whole answer, or several separated by semicolons.

    {"name": "look", "parameters": {"where": "up"}}

Calls of built-in tools begin with the token <|python_tag|>, which may also precede an object.
"""

from __future__ import annotations

from collections.abc import Collection

from headstart.prompt.answer_parts import AnswerPart
from headstart.prompt.tool_calls.grammar import Function, Literal, objects
from headstart.prompt.tool_calls.parser import CallParser

TAG = "<|python_tag|>"
MARKERS = (TAG,)


class LlamaParser(CallParser):
    markers: tuple[str, ...] = (TAG,)

    def __init__(self, names: Collection[str], most: int | None = None) -> None:
        super().__init__(names, most)
        self.state = self.read_start

    def read_start(self) -> list[AnswerPart] | None:
        start = self.buffer.lstrip()
        if not start and not self.ending:
            return None
        if start.startswith("{"):
            self.begin_object()
        else:
            self.state = self.read_text
        return []

    def after_object(self) -> list[AnswerPart] | None:
        rest = self.buffer.lstrip()
        if not rest:
            return None
        if rest[0] not in ";{":
            return self.end_call()
        self.opening = ";" if rest[0] == ";" else ""
        self.buffer = rest.removeprefix(";")
        self.begin_object()
        return []


def grammar(functions: list[Function], literal: Literal, *, several: bool) -> str:
    """The rule for one call: these models don't support several."""
    return "calls: object\n" + objects(functions, "parameters")
