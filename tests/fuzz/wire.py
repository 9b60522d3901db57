"""JSON with what json.dumps can't write: values too deep, too wide, or no JSON at all."""

from __future__ import annotations

import json
from typing import Any

# In a recipe an object with one of these as its only key stands for something large or wrong.
RAW, REPEATED, LISTED, WIDE = "$raw", "$repeated", "$listed", "$wide"


def text(value: Any) -> str:
    """The JSON of `value`, in which

    {"$raw": [["[", 3], ["]", 3]]} stands for the text [[[]]],
    {"$repeated": ["ab", 3]} for the string "ababab",
    {"$listed": [1, 3]} for the list [1, 1, 1], and
    {"$wide": 3} for an object of three keys.
    """
    match value:
        case {"$raw": parts}:
            return "".join(part * n for part, n in parts)
        case {"$repeated": [part, n]}:
            return json.dumps(part * n)
        case {"$listed": [item, n]}:
            return "[" + ",".join([text(item)] * n) + "]"
        case {"$wide": n}:
            return "{" + ",".join(f'"k{i}":{i}' for i in range(n)) + "}"
        case dict():
            return "{" + ",".join(f"{json.dumps(key)}:{text(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ",".join(map(text, value)) + "]"
        case _:
            return json.dumps(value)


def encoded(value: Any) -> bytes:
    return text(value).encode("utf-8", "surrogatepass")


def replaced(value: Any, path: list[Any], new: Any) -> Any:
    """A copy with `new` at the path; the value itself where there is no such path."""
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(value, dict):
        return {**value, key: replaced(value.get(key), rest, new)}
    if isinstance(value, list) and isinstance(key, int) and 0 <= key < len(value):
        return [*value[:key], replaced(value[key], rest, new), *value[key + 1 :]]
    return value


def paths(value: Any) -> list[list[Any]]:
    """The places of everything in it, the whole first."""
    found: list[list[Any]] = [[]]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += [[key, *path] for path in paths(item)]
    return found
