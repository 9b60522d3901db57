"""Calls in either of the two formats of Google's guide to function calling with Gemma.

    [look(where="up"), listen()]
    {"name": "look", "parameters": {"where": "up"}}

Either may be in a code block of the language tool_code or json. Python calls are parsed when complete.
"""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from headstart.prompt.answer_parts import AnswerPart
from headstart.prompt.tool_calls.llama import LlamaParser
from headstart.prompt.tool_calls.scanner import BracketEnd, CallHead, encoded

FENCE, CODE, JSON = "```", "```tool_code", "```json"
# The beginning of a list of calls, possibly incomplete.
LIST = re.compile(r"\s*\[\s*(?:([A-Za-z_]\w*)\s*(\(?))?")


class PythonEnd(BracketEnd):
    opening, closing, quotes = "{[(", "}])", "\"'"


class GemmaParser(LlamaParser):
    markers = (CODE, JSON)
    fenced = False

    def read_start(self) -> list[AnswerPart] | None:
        if not self.buffer.lstrip().startswith("["):
            return super().read_start()
        self.end_of_brackets = PythonEnd()
        self.n_scanned = 0
        self.state = self.read_list
        return []

    def read_list(self) -> list[AnswerPart] | None:
        if not self._may_be_list():
            return self.give_back()
        size = self.end_of_brackets.find(self.buffer[self.n_scanned :])
        if size is None:
            self.n_scanned = len(self.buffer)
            return self.give_back() if self.ending else None
        return self._calls(self.n_scanned + size, self.n_scanned + size)

    def _may_be_list(self) -> bool:
        found = LIST.match(self.buffer)
        if not found:
            return False
        name, bracket = found.groups()
        if bracket:
            return name in self.names
        is_whole = found.end() == len(self.buffer)
        return is_whole and any(known.startswith(name or "") for known in self.names)

    def begin_call(self) -> None:
        self.fenced = self.opening.endswith(JSON)
        if self.fenced:
            self.begin_object()
        else:
            self.state = self.read_code

    def read_code(self) -> list[AnswerPart] | None:
        """A state: code up to the end of the block or of the answer."""
        size = self.buffer.find(FENCE)
        if size < 0 and not self.ending:
            return None
        return self._calls(size, size + len(FENCE)) if size >= 0 else self._calls(len(self.buffer), None)

    def _calls(self, size: int, end: int | None) -> list[AnswerPart]:
        """The calls in the first `size` characters; their block ends at `end`."""
        try:
            heads = _read_python(self.buffer[:size])
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return self.give_back()
        room = len(heads) if self.most is None else self.most - self.n_calls
        if not heads or len(heads) > room or any(head.name not in self.names for head in heads):
            return self.give_back()
        self.buffer = self.buffer[end:] if end is not None else ""
        return [part for head in heads for part in self.announce(head)] + self.end_call()

    def after_object(self) -> list[AnswerPart] | None:
        if not self.fenced:
            return super().after_object()
        return None if self.skip(FENCE) is None else self.end_call()


def _read_python(text: str) -> list[CallHead]:
    """Parses calls as statements or in lists. Raises SyntaxError, ValueError, and what a parser raises
    without memory or stack."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        statements = ast.parse(text.strip()).body
    heads = []
    for statement in statements:
        if not isinstance(statement, ast.Expr):
            raise ValueError("no call")
        value = statement.value
        heads += [_read_call(each) for each in (value.elts if isinstance(value, ast.List) else [value])]
    return heads


def _read_call(node: ast.expr) -> CallHead:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError("no call with named arguments")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("no call with named arguments")
        arguments[keyword.arg] = _literal(keyword.value)
    return CallHead(node.func.id, 0, encoded(arguments))


def _literal(node: ast.expr) -> Any:
    """The literal's value; JSON's true, false and null are accepted too."""
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    return ast.literal_eval(node)
