"""What an answer's text says: words, reasoning, calls of tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class CallDelta:
    """A piece of the answer's call number `index`. The first one has `id` and `name`; `arguments` is text
    that continues the earlier pieces', a JSON object once they are all together."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class Part:
    """One of the three is there."""

    text: str = ""
    reasoning: str = ""
    call: CallDelta | None = None


class Parser(Protocol):
    """Reads one answer piece by piece. What can't be told apart yet is held back; nothing is lost, and what
    looks like a call but can't be read as one is text."""

    def add(self, text: str) -> list[Part]: ...

    def end(self) -> list[Part]:
        """What is left when no text follows."""


class PlainText:
    """All of the answer is text."""

    def add(self, text: str) -> list[Part]:
        return [Part(text=text)] if text else []

    def end(self) -> list[Part]:
        return []
