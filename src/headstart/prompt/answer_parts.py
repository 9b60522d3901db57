"""The parts of an answer's text: words, reasoning, tool calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class CallDelta:
    """A piece of the answer's call number `index`. The first piece has `id` and `name`; `arguments` continues
    the text of the earlier pieces, which together are a JSON object."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class AnswerPart:
    """A part of an answer; exactly one field is set."""

    text: str = ""
    reasoning: str = ""
    call: CallDelta | None = None


class Parser(Protocol):
    """Parses one answer piece by piece. Ambiguous text is held back; nothing is lost, and a malformed call is
    returned as text."""

    def add(self, text: str) -> list[AnswerPart]: ...

    def end(self) -> list[AnswerPart]:
        """Returns what was held back, when no text follows."""


class PlainText:
    """A parser for answers that are text only."""

    def add(self, text: str) -> list[AnswerPart]:
        return [AnswerPart(text=text)] if text else []

    def end(self) -> list[AnswerPart]:
        return []
