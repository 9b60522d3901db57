"""Calls in the format of Hermes and Qwen, which is also the default format.

<tool_call>
{"name": "look", "arguments": {"where": "up"}}
</tool_call>
"""

from __future__ import annotations

from headstart.prompt.answer_parts import AnswerPart
from headstart.prompt.tool_calls.grammar import Function, Literal, objects
from headstart.prompt.tool_calls.parser import CallParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MARKERS = (OPEN, CLOSE)


class HermesParser(CallParser):
    markers = (OPEN,)

    def after_object(self) -> list[AnswerPart] | None:
        return None if self.skip(CLOSE) is None else self.end_call()


def grammar(functions: list[Function], literal: Literal, *, several: bool) -> str:
    more = r'("\n" tagged)*' if several else ""
    return (
        f"calls: tagged {more}\n"
        rf'tagged: {literal(OPEN)} "\n" object "\n" {literal(CLOSE)}'
        f"\n{objects(functions, 'arguments')}"
    )
