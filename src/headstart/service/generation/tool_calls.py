"""The functions that an answer may call, how its text is read, and the grammar that forces a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from headstart.errors import BadRequest
from headstart.prompt import reasoning
from headstart.prompt.answer_parts import Parser, PlainText
from headstart.prompt.reasoning import ReasoningParser
from headstart.prompt.tool_calls.grammar import Function, quoted, schema_of
from headstart.prompt.vocabulary import Vocabulary
from headstart.service.interface.options import Calling

Tool = Mapping[str, Any]
# So many tokens at the prompt's end are searched for the start of reasoning.
ENDING = 16


@dataclass(frozen=True)
class Reading:
    """How an answer is read: `piece` gives the bytes of its tokens, `parser` reads its text. `grammar`: what
    the answer must match; "" for anything."""

    piece: Callable[[int], bytes]
    parser: Callable[[], Parser]
    grammar: str = ""


def reading(
    vocabulary: Vocabulary, tools: Sequence[Tool], calling: Calling, prompt: Sequence[int]
) -> Reading:
    """Raises BadRequest if a required call is impossible."""
    functions = _functions(tools, calling)
    ending = _ending(vocabulary, prompt)
    calls = calling.choice != "none" and bool(tools)
    return Reading(
        vocabulary.spelled(calls=calls),
        partial(_parser, vocabulary, tools if calls else (), calling, inside=ending.endswith(reasoning.OPEN)),
        _grammar(vocabulary, functions, calling, ending) if calling.choice == "required" else "",
    )


def _functions(tools: Sequence[Tool], calling: Calling) -> list[Function]:
    """The functions of which one must be called; none unless a call is required."""
    if calling.choice != "required":
        return []
    if not tools:
        raise BadRequest("tool_choice requires a call, but there are no tools.", param="tool_choice")
    functions = [tool["function"] for tool in tools]
    callable_functions = [each for each in functions if calling.name in (None, each["name"])]
    if not callable_functions:
        raise BadRequest(
            f"tool_choice names {calling.name!r}, which is none of the tools.", param="tool_choice"
        )
    return [(each["name"], _schema(each)) for each in callable_functions]


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    schema = schema_of(function.get("parameters"))
    if schema["type"] != "object":
        raise BadRequest(f"The parameters of {function['name']!r} must be of type object.", param="tools")
    return schema


def _ending(vocabulary: Vocabulary, prompt: Sequence[int]) -> str:
    written = map(vocabulary.written, prompt[-ENDING:])
    return b"".join(written).decode(errors="replace").rstrip()


def _parser(vocabulary: Vocabulary, tools: Sequence[Tool], calling: Calling, *, inside: bool) -> Parser:
    parser: Parser = PlainText()
    if tools:
        several = calling.parallel and calling.name is None
        names = {tool["function"]["name"] for tool in tools}
        parser = vocabulary.call_format.parser(names, None if several else 1)
    return ReasoningParser(parser, inside=inside) if calling.reasoning else parser


def _grammar(vocabulary: Vocabulary, functions: list[Function], calling: Calling, ending: str) -> str:
    """Reasoning, if the model has it, followed by calls. Doesn't check that the grammar compiles."""
    several = calling.parallel and calling.name is None

    def literal(marker: str) -> str:
        token = vocabulary.markers.get(marker)
        return quoted(marker) if token is None else f"<[{token}]>"

    if ending.endswith(reasoning.OPEN):
        start = "start: thoughts calls"
    elif vocabulary.reasons and not ending.endswith(reasoning.CLOSE):
        start = f"start: ({literal(reasoning.OPEN)} thoughts)? calls"
    else:
        start = "start: calls"
    try:
        rules = vocabulary.call_format.grammar(functions, literal, several=several)
    except RecursionError as error:
        raise BadRequest("The tools' parameters are nested too deeply.", param="tools") from error
    return f"{start}\n{rules}\n{reasoning.grammar(literal) if 'thoughts' in start else ''}"
