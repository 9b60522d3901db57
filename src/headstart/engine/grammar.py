"""Grammars that an answer has to match.

They are llguidance's: a JSON schema, a regular expression or a Lark grammar, compiled for the tokens of one
model. A grammar may need unbounded time or memory: LIMITS in `matcher.py` bound the work of a step,
`grammar_check.py` that of compiling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from headstart.engine.matcher import Matcher

# llguidance recurses as deep as rules refer to each other.
STACK_BYTES = 512 << 20


class GrammarError(Exception):
    """A grammar can't be compiled, or exceeds the limits of a step. `fault`: the reason."""

    def __init__(self, fault: str) -> None:
        super().__init__(f"The grammar of the answer can't be followed: {fault}")
        self.fault = fault


class Grammars:
    """Compiles grammars for one model. `tokenizer` is called at the first grammar, and takes a large part of
    a second."""

    def __init__(self, tokenizer: Callable[[], LLTokenizer]) -> None:
        self._make_tokenizer = tokenizer
        self._tokenizer: LLTokenizer | None = None

    def compile(self, grammar: str) -> Matcher:
        """A matcher for an answer that has not begun. Raises GrammarError."""
        # llguidance and numpy are imported at the first grammar: most workers never have one.
        from headstart.engine.matcher import Matcher, compiled

        try:
            self._tokenizer = self._tokenizer or self._make_tokenizer()
        except (ValueError, OverflowError) as error:
            raise GrammarError(f"this model's vocabulary is not fit for grammars: {error}") from error
        return Matcher(compiled(self._tokenizer, grammar), self._tokenizer.vocab_size)
