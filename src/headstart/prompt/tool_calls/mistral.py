"""Calls in the formats of Mistral's models: earlier ones as a list, later ones each with its name.

[TOOL_CALLS][{"name": "look", "arguments": {"where": "up"}}]
[TOOL_CALLS]look[ARGS]{"where": "up"}
"""

from __future__ import annotations

import secrets

from headstart.prompt.answer_parts import AnswerPart
from headstart.prompt.tool_calls.grammar import Function, Literal, arguments, objects, quoted
from headstart.prompt.tool_calls.parser import ID_CHARACTERS, CallParser
from headstart.prompt.tool_calls.scanner import CallHead

OPEN, ARGS, ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
MARKERS = (OPEN, ARGS, ID)


class MistralParser(CallParser):
    markers = (OPEN,)

    def new_id(self) -> str:
        """An id of nine letters and digits, the only ones that their templates accept."""
        return "".join(secrets.choice(ID_CHARACTERS) for _ in range(9))

    def begin_call(self) -> None:
        self.state = self.read_kind

    def read_kind(self) -> list[AnswerPart] | None:
        start = self.buffer.lstrip()
        if not start:
            return self.give_back() if self.ending else None
        if start[0] == "[":
            space = self.buffer[: len(self.buffer) - len(start)]
            self.opening += space + "["
            self.buffer = start[1:]
            self.begin_object()
        else:
            self.state = self.read_name
        return []

    def read_name(self) -> list[AnswerPart] | None:
        """A state: the name, up to the first bracket of the arguments."""
        before, bracket, _ = self.buffer.partition("{")
        if not bracket:
            return None if not self.ending and self._may_be_name(before) else self.give_back()
        name = before.strip().removesuffix(ARGS).partition(ID)[0].strip()
        if name not in self.names:
            return self.give_back()
        self.buffer = self.buffer[len(before) :]
        self.after_arguments = self.end_call
        return self.announce(CallHead(name, len(before)))

    def _may_be_name(self, text: str) -> bool:
        start = text.strip()
        return any(name.startswith(start) or start.startswith(name) for name in self.names)

    def after_object(self) -> list[AnswerPart] | None:
        rest = self.buffer.lstrip()
        if not rest:
            return None
        if rest[0] != ",":
            self.buffer = rest.removeprefix("]")
            return self.end_call()
        self.opening = ","
        self.buffer = rest[1:]
        self.begin_object()
        return []


def list_grammar(functions: list[Function], literal: Literal, *, several: bool) -> str:
    more = '(", " object)*' if several else ""
    return f'calls: {literal(OPEN)} "[" object {more} "]"\n{objects(functions, "arguments")}'


def named_grammar(functions: list[Function], literal: Literal, *, several: bool) -> str:
    each = " | ".join(
        f"{quoted(name)} {literal(ARGS)} arguments_{i}" for i, (name, _) in enumerate(functions)
    )
    more = "+" if several else ""
    return f"calls: named{more}\nnamed: {literal(OPEN)} ({each})\n{arguments(functions)}"
