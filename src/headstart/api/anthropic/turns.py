"""Conversion of Anthropic's turns to the messages of chat templates: each tool result is a message of its
own, adjacent blocks of text are one message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headstart.service.interface.options import Breakpoint

# Adjacent blocks of text become paragraphs.
BETWEEN = "\n\n"


class Turns:
    """`breakpoints`: the breakpoints in prompt order, one for each block with `cache_control`."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.breakpoints: list[Breakpoint] = []
        self._tools: dict[str, str] = {}

    def add_text(self, role: str, text: str) -> None:
        """Joins the text to the last message if that has the same role."""
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != role:
            self.messages.append({"role": role, "content": text})
        elif last["content"] and text:
            last["content"] += BETWEEN + text
        else:
            last["content"] += text

    def add_call(self, call_id: str, name: str, arguments: Mapping[str, Any]) -> None:
        """Adds a call to the last message, which must be the assistant's."""
        self._tools[call_id] = name
        function = {"name": name, "arguments": arguments}
        calls = self.messages[-1].setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": function})

    def add_result(self, call_id: str, text: str) -> None:
        """Adds the result of a call, with the tool's name for templates that need it."""
        name = {"name": self._tools[call_id]} if call_id in self._tools else {}
        self.messages.append({"role": "tool", "content": text, "tool_call_id": call_id, **name})

    def add_breakpoint(self, ttl_seconds: float | None) -> None:
        """Adds a breakpoint after the messages so far, unless `ttl_seconds` is None. Before all messages it
        is one at the beginning of the first."""
        if ttl_seconds is not None:
            characters = len(self.messages[-1]["content"]) if self.messages else 0
            self.breakpoints.append(Breakpoint(max(len(self.messages), 1), characters, ttl_seconds))
