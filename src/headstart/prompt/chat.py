"""Chats as templates take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

Message = Mapping[str, Any]
# A function that the model may call, as OpenAI's API describes it.
Tool = Mapping[str, Any]
# What else a template is told, such as enable_thinking.
Variables = Mapping[str, Any]
NO_VARIABLES: Variables = MappingProxyType({})
# Characters that a prompt may have: more than any model's context holds.
MOST_CHARACTERS = 4 << 20
# The key of a message, the last of an opening, whose text goes on in other ways.
UNFINISHED = "unfinished"


def is_open(messages: Sequence[Message]) -> bool:
    """Whether the answer continues the last message."""
    last = messages[-1] if messages else {"role": ""}
    return last["role"] == "assistant" and not last.get("tool_calls")
