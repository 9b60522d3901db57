"""What an answer is to look like, as grammars for the engine. None of these functions checks that its grammar
compiles: `service/grammars.py` does, for all of them.

White space in JSON: between any two parts at most one space, or a line break and indentation. A model that is
free to write more may write it forever.
"""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from headstart.errors import BadRequest

Schema = dict[str, Any]

WHITESPACE = r"[ ]|\n[ ]{0,24}"
# Of a schema's own wishes ("x-guidance") none is left: they could undo what is promised here.
JSON: dict[str, Any] = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    "coerce_one_of": False,
    "lenient": False,
}
OBJECT: Schema = {"type": "object"}
GBNF = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)


def json_grammar(schema: Schema, param: str) -> str:
    """Answers that are JSON of this schema. Raises BadRequest for what is no JSON."""
    return f'{{"grammars": [{{"json_schema": {_text(schema, param)}}}]}}'


def _text(schema: Schema, param: str) -> str:
    try:
        text = json.dumps({**schema, "x-guidance": JSON}, allow_nan=False, ensure_ascii=False)
        text.encode()
        return text
    except (ValueError, RecursionError):
        raise BadRequest(
            f"{param} has a schema that is no JSON, or is nested too deeply.", param=param
        ) from None


def choice_grammar(choices: list[str]) -> str:
    """One of these texts."""
    return lark_grammar("start: " + " | ".join(json.dumps(choice) for choice in choices))


def regex_grammar(regex: str) -> str:
    """Answers that match the whole of it, in the syntax of Rust's `regex`."""
    return LLMatcher.grammar_from_regex(regex)


def lark_grammar(lark: str) -> str:
    """In llguidance's Lark syntax; the answer is what `start` matches."""
    return LLMatcher.grammar_from_lark(lark)


def written_grammar(text: str, param: str) -> str:
    """In Lark's syntax or, told by its `::=`, GBNF. Raises BadRequest."""
    if not GBNF.search(text):
        return lark_grammar(text)
    try:
        return lark_grammar(gbnf_to_lark(text))
    except Exception as error:
        # llguidance's translator raises whatever its code runs into.
        raise BadRequest(f"{param} is no GBNF grammar: {error}", param=param) from None
