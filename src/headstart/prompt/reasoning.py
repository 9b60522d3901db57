"""The reasoning at the start of an answer, between <think> and </think>."""

from __future__ import annotations

from headstart.prompt.answer_parts import AnswerPart, Parser
from headstart.prompt.tool_calls.grammar import Literal
from headstart.tokens import overlap

OPEN, CLOSE = "<think>", "</think>"
MARKERS = (OPEN, CLOSE)


def grammar(literal: Literal) -> str:
    """The rule `thoughts`: reasoning after its opening tag, up to the start of the text."""
    if literal(CLOSE) == f'"{CLOSE}"':
        return "thoughts: unclosed /\\n{0,2}/\nunclosed[lazy]: /(.|\\n)*<\\/think>/"
    return f"thoughts: /(.|\\n)*/ {literal(CLOSE)} /\\n{{0,2}}/"


class ReasoningParser:
    """Separates reasoning from the text after it, which `rest` parses. `inside`: the prompt already contains
    the opening tag. White space around the reasoning is dropped."""

    def __init__(self, rest: Parser, *, inside: bool) -> None:
        self.rest = rest
        self.buffer = ""
        self.undecided = not inside
        self.inside = inside
        self.has_begun = False

    def add(self, text: str) -> list[AnswerPart]:
        self.buffer += text
        return self._read(ending=False)

    def end(self) -> list[AnswerPart]:
        return [*self._read(ending=True), *self.rest.end()]

    def _read(self, *, ending: bool) -> list[AnswerPart]:
        if self.undecided:
            self._decide(ending=ending)
        if self.undecided:
            return []
        reasoning = self._reasoning(ending=ending) if self.inside else ""
        parts = [AnswerPart(reasoning=reasoning)] if reasoning else []
        if self.inside:
            return parts
        text, self.buffer = self.buffer, ""
        return [*parts, *self.rest.add(text)] if text else parts

    def _decide(self, *, ending: bool) -> None:
        """Decides whether the answer begins with reasoning."""
        start = self.buffer.lstrip()
        if start.startswith(OPEN):
            self.buffer = start[len(OPEN) :]
            self.undecided, self.inside = False, True
        elif ending or not OPEN.startswith(start):
            self.undecided = False

    def _reasoning(self, *, ending: bool) -> str:
        """Takes the reasoning from `buffer`."""
        if not self.has_begun:
            self.buffer = self.buffer.lstrip()
            self.has_begun = bool(self.buffer)
        text, closed, rest = self.buffer.partition(CLOSE)
        if closed:
            # White space may follow first, and then text.
            self.inside, self.undecided = False, False
            self.rest = Stripped(self.rest)
            self.buffer = rest
            return text.rstrip()
        if ending:
            self.buffer = ""
            return text
        size = len(text) - overlap(text, CLOSE)
        size = len(text[:size].rstrip())
        self.buffer = text[size:]
        return text[:size]


class Stripped:
    """Drops leading white space."""

    def __init__(self, rest: Parser) -> None:
        self.rest = rest
        self.has_begun = False

    def add(self, text: str) -> list[AnswerPart]:
        if not self.has_begun:
            text = text.lstrip()
            self.has_begun = bool(text)
        return self.rest.add(text) if text else []

    def end(self) -> list[AnswerPart]:
        return self.rest.end()
