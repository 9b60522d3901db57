"""The tokens that may follow in an answer that has to match a grammar, by llguidance."""

from __future__ import annotations

from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from headstart.engine.grammar import GrammarError

# A step that uses all its fuel takes 14 ms; the worst one found took 0.4 s, and ended its request. A lexer
# state takes some 700 bytes.
LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000, max_lexer_states=100_000, max_grammar_size=100_000, verbose_errors=False
)

Tokens = np.ndarray[Any, np.dtype[np.intp]]


class Matcher:
    """The position of one answer in its grammar. All methods raise GrammarError."""

    def __init__(self, matcher: LLMatcher, n_vocab: int) -> None:
        self.matcher = matcher
        self.n_vocab = n_vocab
        self.mask = np.zeros((n_vocab + 31) // 32, dtype=np.int32)

    def allows(self, token: int) -> bool:
        """Whether the token may come next; much faster than `allowed`."""
        return self.matcher.validate_tokens([token]) == 1

    def allowed(self) -> Tokens:
        """The tokens that may come next, in ascending order; never empty. If the answer may end, all tokens
        that end an answer are among them."""
        self.matcher.unsafe_compute_mask_ptr(self.mask.ctypes.data, self.mask.nbytes)
        self._check()
        bits = np.unpackbits(self.mask.view(np.uint8), bitorder="little", count=self.n_vocab)
        allowed = np.flatnonzero(bits)
        if not len(allowed):
            raise GrammarError("no token can continue the answer")
        return allowed

    def accept(self, token: int) -> None:
        """Advances by the chosen token, which must be allowed."""
        self.matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self.matcher.is_error():
            raise GrammarError(reason(self.matcher.get_error()))

    def copy(self) -> Matcher:
        """A matcher for another answer with the same tokens so far. Both share their lexer states, and the
        limit on these."""
        return Matcher(self.matcher.deep_copy(), self.n_vocab)

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and nothing can follow."""
        return self.matcher.is_stopped()


def compiled(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Raises GrammarError."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise GrammarError(reason(matcher.get_error()))
    return matcher


def reason(error: str) -> str:
    """The error message of llguidance without the parts for its developers, cut after 500 characters."""
    text = error.replace("<non-verbose/>", "").strip().replace("NoExtensionBias", "nothing can match it")
    # Requests don't have this option.
    text = text.replace("Enable 'coerce_one_of' option to approximate oneOf with anyOf", "Use anyOf")
    return text if len(text) <= 500 else text[:500] + "..."
