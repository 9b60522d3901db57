"""The forms of calls there are, and which one a model's template teaches."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from headstart.prompt.answer_parts import Parser
from headstart.prompt.tool_calls import gemma, hermes, llama, mistral
from headstart.prompt.tool_calls.grammar import Function, Literal


class Grammar(Protocol):
    def __call__(self, functions: list[Function], literal: Literal, *, several: bool) -> str:
        """The rule `calls` and those it needs: one call of one of the functions, or `several`."""


@dataclass(frozen=True)
class Dialect:
    """`name`: by which processes speak of it. `signs`: one of them is in the templates that teach it.
    `markers` may be special tokens, which are no text elsewhere. `parser` takes the names of the functions
    there are, and how many calls there may be."""

    name: str
    signs: tuple[str, ...]
    markers: tuple[str, ...]
    parser: Callable[[Collection[str], int | None], Parser]
    grammar: Grammar


HERMES = Dialect("hermes", (hermes.OPEN,), hermes.MARKERS, hermes.HermesParser, hermes.grammar)
MISTRAL_NAMED = Dialect(
    "mistral_named", (mistral.ARGS,), mistral.MARKERS, mistral.MistralParser, mistral.named_grammar
)
MISTRAL = Dialect("mistral", (mistral.OPEN,), mistral.MARKERS, mistral.MistralParser, mistral.list_grammar)
# What asks for Python is answered by objects where it is made to: JSON's schemas are of those.
GEMMA = Dialect("gemma", ("tool_code", "func_name1("), (), gemma.GemmaParser, llama.grammar)
LLAMA = Dialect(
    "llama",
    (llama.TAG, '{"name": function name, "parameters"'),
    llama.MARKERS,
    llama.LlamaParser,
    llama.grammar,
)
# Of the signs that a template has, the first here counts.
DIALECTS = (MISTRAL_NAMED, MISTRAL, HERMES, GEMMA, LLAMA)


def dialect_of(template: str) -> Dialect:
    """That of a template with tools; Hermes's where nothing is known of it, which is the default form too."""
    known = (dialect for dialect in DIALECTS if any(sign in template for sign in dialect.signs))
    return next(known, HERMES)


def named(name: str) -> Dialect:
    """Raises KeyError."""
    return {dialect.name: dialect for dialect in DIALECTS}[name]
