"""The known tool-call formats, and the choice of one from a model's template."""

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
class CallFormat:
    """A tool-call format. `name`: its identifier between processes. `signs`: texts of which one is in each
    template of this format. `markers`: texts that may be special tokens, which are otherwise not part of the
    text. `parser` takes the names of the functions and the maximum number of calls."""

    name: str
    signs: tuple[str, ...]
    markers: tuple[str, ...]
    parser: Callable[[Collection[str], int | None], Parser]
    grammar: Grammar


HERMES = CallFormat("hermes", (hermes.OPEN,), hermes.MARKERS, hermes.HermesParser, hermes.grammar)
MISTRAL_NAMED = CallFormat(
    "mistral_named", (mistral.ARGS,), mistral.MARKERS, mistral.MistralParser, mistral.named_grammar
)
MISTRAL = CallFormat("mistral", (mistral.OPEN,), mistral.MARKERS, mistral.MistralParser, mistral.list_grammar)
# Gemma's Python calls are forced as objects, since JSON schemas describe those.
GEMMA = CallFormat("gemma", ("tool_code", "func_name1("), (), gemma.GemmaParser, llama.grammar)
LLAMA = CallFormat(
    "llama",
    (llama.TAG, '{"name": function name, "parameters"'),
    llama.MARKERS,
    llama.LlamaParser,
    llama.grammar,
)
# The first format with a sign in the template is chosen.
CALL_FORMATS = (MISTRAL_NAMED, MISTRAL, HERMES, GEMMA, LLAMA)


def call_format_of(template: str) -> CallFormat:
    """The format of a template with tools; Hermes, the default, if none is recognised."""
    known = (each for each in CALL_FORMATS if any(sign in template for sign in each.signs))
    return next(known, HERMES)


def named(name: str) -> CallFormat:
    """Raises KeyError."""
    return {each.name: each for each in CALL_FORMATS}[name]
