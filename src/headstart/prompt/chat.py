"""Chats in the form that templates take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

Message = Mapping[str, Any]
# A function that the model may call, as OpenAI's API describes it.
Tool = Mapping[str, Any]
# Further template variables, such as enable_thinking.
Variables = Mapping[str, Any]
NO_VARIABLES: Variables = MappingProxyType({})
# Maximum characters of a prompt: more than any model's context holds.
MOST_CHARACTERS = 4 << 20
# Key that marks the last message of a cached prefix as unfinished: its text can continue in different ways.
UNFINISHED = "unfinished"


def is_open(messages: Sequence[Message]) -> bool:
    """Whether the answer continues the last message."""
    last = messages[-1] if messages else {"role": ""}
    return last["role"] == "assistant" and not last.get("tool_calls")
