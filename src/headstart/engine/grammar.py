"""Grammars of answers: which tokens an answer may go on with, so that it will match.

They are llguidance's: a JSON schema, a regular expression or a Lark grammar, compiled for the tokens of one
model. A grammar may ask for more time or memory than there is: LIMITS bound what one step may take,
`engine/checking.py` what compiling does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# A step that takes all of its fuel takes 14 ms; the worst one found took 0.4 s, and ended its request. A
# state takes some 700 bytes.
LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000, max_lexer_states=100_000, max_grammar_size=100_000, verbose_errors=False
)
# llguidance recurses as deep as rules refer to each other.
STACK_BYTES = 512 << 20

Tokens = np.ndarray[Any, np.dtype[np.intp]]


class GrammarError(Exception):
    """A grammar can't be compiled, or asks for more than a step may take. `fault`: why."""

    def __init__(self, fault: str) -> None:
        super().__init__(f"The grammar of the answer can't be followed: {fault}")
        self.fault = fault


class Matcher:
    """What one answer may go on with. All of it raises GrammarError."""

    def __init__(self, matcher: LLMatcher, n_vocab: int) -> None:
        self.matcher = matcher
        self.n_vocab = n_vocab
        self.mask = np.zeros((n_vocab + 31) // 32, dtype=np.int32)

    def allows(self, token: int) -> bool:
        """Whether it may come next; takes much less time than finding all that may."""
        return self.matcher.validate_tokens([token]) == 1

    def allowed(self) -> Tokens:
        """The tokens that may come next, in their order; never none. Where the answer may end, all that end
        one are among them."""
        self.matcher.unsafe_compute_mask_ptr(self.mask.ctypes.data, self.mask.nbytes)
        self._check()
        bits = np.unpackbits(self.mask.view(np.uint8), bitorder="little", count=self.n_vocab)
        allowed = np.flatnonzero(bits)
        if not len(allowed):
            raise GrammarError("no token can continue the answer")
        return allowed

    def accept(self, token: int) -> None:
        """The token, one of those allowed, has been chosen."""
        self.matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self.matcher.is_error():
            raise GrammarError(reason(self.matcher.get_error()))

    def copy(self) -> Matcher:
        """A matcher for another answer that has begun alike. Both share what one of them finds out, and the
        limit of the states that this takes."""
        return Matcher(self.matcher.deep_copy(), self.n_vocab)

    @property
    def ended(self) -> bool:
        """Whether the answer is complete, and nothing but its end can follow."""
        return self.matcher.is_stopped()


class Grammars:
    """Compiles grammars for one model. `tokenizer` makes what they are compiled for, which takes a large part
    of a second, when it is needed first."""

    def __init__(self, tokenizer: Callable[[], LLTokenizer]) -> None:
        self._make_tokenizer = tokenizer
        self._tokenizer: LLTokenizer | None = None

    def compile(self, grammar: str) -> Matcher:
        """A matcher for an answer that has not begun. Raises GrammarError."""
        try:
            self._tokenizer = self._tokenizer or self._make_tokenizer()
        except (ValueError, OverflowError) as error:
            raise GrammarError(f"this model's vocabulary is not fit for grammars: {error}") from error
        return Matcher(compiled(self._tokenizer, grammar), self._tokenizer.vocab_size)


def compiled(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Raises GrammarError."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise GrammarError(reason(matcher.get_error()))
    return matcher


def reason(error: str) -> str:
    """What is wrong, without what only its developers can use."""
    text = error.replace("<non-verbose/>", "").strip().replace("NoExtensionBias", "nothing can match it")
    # An option that requests don't have.
    text = text.replace("Enable 'coerce_one_of' option to approximate oneOf with anyOf", "Use anyOf")
    return text if len(text) <= 500 else text[:500] + "..."
