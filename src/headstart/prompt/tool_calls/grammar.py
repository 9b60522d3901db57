"""Tool-call formats as grammars, in llguidance's variant of Lark. Text generated under them can be parsed by
the parser of the same format, and the arguments match their schemas."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# A name, and the schema of its arguments.
Function = tuple[str, Mapping[str, Any]]
# Writes a marker in a grammar: a marker that is a token may have no text there.
Literal = Callable[[str], str]

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
# White space as in the training data; a small model that may write any can repeat it forever.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# A schema with only these keywords is taken to list all of its properties, unless it says otherwise.
PLAIN = {"type", "properties", "required", "description", "title", "$defs", "definitions", "$schema"}


def quoted(text: str) -> str:
    return json.dumps(text)


def objects(functions: Sequence[Function], key: str) -> str:
    """The rule `object`, which calls one of the functions."""
    heads = [f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": ' for name, _ in functions]
    each = [f'{quoted(head)} arguments_{i} "}}"' for i, head in enumerate(heads)]
    return f"object: {' | '.join(each)}\n{arguments(functions)}"


def arguments(functions: Sequence[Function]) -> str:
    """The rules `arguments_0` and so on."""
    return "\n".join(f"arguments_{i}: %json {json.dumps(schema)}" for i, (_, schema) in enumerate(functions))


def schema_of(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The schema of a function's arguments, an object; without a schema it has no properties. A schema with
    only plain keywords allows no other properties than it names."""
    schema = {"type": "object", **(parameters or NO_ARGUMENTS)}
    if schema.keys() <= PLAIN and "properties" in schema:
        schema["additionalProperties"] = False
    return schema | {"x-guidance": SPACING}
