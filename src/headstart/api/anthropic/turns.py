"""Anthropic's turns as chat templates take them: results of tools are messages of their own, blocks of text
that follow each other are one message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headstart.service.interface.options import Breakpoint

# Blocks are paragraphs.
BETWEEN = "\n\n"


class Turns:
    """`marks`: in their order, one for each marked block."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.marks: list[Breakpoint] = []
        self._tools: dict[str, str] = {}

    def add_text(self, role: str, text: str) -> None:
        """Turns of one role that follow each other are one."""
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != role:
            self.messages.append({"role": role, "content": text})
        elif last["content"] and text:
            last["content"] += BETWEEN + text
        else:
            last["content"] += text

    def add_call(self, call_id: str, name: str, arguments: Mapping[str, Any]) -> None:
        """By the assistant, whose message has begun."""
        self._tools[call_id] = name
        function = {"name": name, "arguments": arguments}
        calls = self.messages[-1].setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": function})

    def add_result(self, call_id: str, text: str) -> None:
        """What the tool of that call said; the name is for templates that want it."""
        name = {"name": self._tools[call_id]} if call_id in self._tools else {}
        self.messages.append({"role": "tool", "content": text, "tool_call_id": call_id, **name})

    def mark(self, ttl_seconds: float | None) -> None:
        """Marks what there is so far, unless `ttl_seconds` is None."""
        if ttl_seconds is not None:
            characters = len(self.messages[-1]["content"]) if self.messages else 0
            self.marks.append(Breakpoint(len(self.messages), characters, ttl_seconds))

    def placed(self) -> list[Breakpoint]:
        """The marks, those without any message before them left out."""
        return [mark for mark in self.marks if mark.messages]
