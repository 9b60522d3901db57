"""Sampling parameters as a llama.cpp sampler chain."""

from __future__ import annotations

import ctypes
import math
import secrets
from collections.abc import Sequence as Seq
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import llama_cpp as lib
import numpy as np

from headstart.engine.llama.context import LlamaContext
from headstart.protocol import Sampling

if TYPE_CHECKING:
    from headstart.engine.matcher import Matcher, Tokens

Scores = np.ndarray[Any, np.dtype[np.float32]]
CANDIDATE = np.dtype(lib.llama_token_data)


class LlamaSampler:
    """A chain in llama.cpp's usual order: biases, penalties, top-k, top-p, min-p, temperature, draw. With a
    `matcher` it chooses among the allowed tokens."""

    def __init__(
        self, sampling: Sampling, history: Seq[int], vocab: Any, matcher: Matcher | None = None
    ) -> None:
        self.n_vocab = lib.llama_vocab_n_tokens(vocab)
        self.matcher = matcher
        biases = _biases(sampling, vocab)
        self.greedy = sampling.temperature == 0 and not self._has_penalties(sampling) and not biases
        self.chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for link in self._links(sampling, biases):
            lib.llama_sampler_chain_add(self.chain, link)
        for token in history[-sampling.repeat_last_n :] if self._has_penalties(sampling) else ():
            lib.llama_sampler_accept(self.chain, token)

    @staticmethod
    def _has_penalties(sampling: Sampling) -> bool:
        penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        return sampling.repeat_last_n > 0 and penalties != (1.0, 0.0, 0.0)

    def _links(self, sampling: Sampling, biases: dict[int, float]) -> list[int]:
        links = []
        if biases:
            each = (lib.llama_logit_bias(token, bias) for token, bias in biases.items())
            array = (lib.llama_logit_bias * len(biases))(*each)
            links.append(lib.llama_sampler_init_logit_bias(self.n_vocab, len(biases), array))
        if self._has_penalties(sampling):
            penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
            last_n = sampling.repeat_last_n
            links.append(lib.llama_sampler_init_penalties(self.n_vocab, last_n, *penalties))
        if sampling.temperature == 0:
            return [*links, lib.llama_sampler_init_greedy()]
        seed = secrets.randbits(31) if sampling.seed is None else sampling.seed & 0x7FFFFFFF
        return [
            *links,
            lib.llama_sampler_init_top_k(sampling.top_k),
            lib.llama_sampler_init_top_p(sampling.top_p, 1),
            lib.llama_sampler_init_min_p(sampling.min_p, 1),
            lib.llama_sampler_init_temp(sampling.temperature),
            lib.llama_sampler_init_dist(seed),
        ]

    @property
    def ended(self) -> bool:
        return self.matcher is not None and self.matcher.ended

    def choose(self, context: LlamaContext, row: int) -> int:
        """The token after piece number `row` of the last batch. Raises GrammarError."""
        if self.matcher:
            return self._choose_allowed(self.matcher, context.logits(row))
        if self.greedy:
            return context.most_likely(row)
        return int(lib.llama_sampler_sample(self.chain, context.context, context.sampled_at[row]))

    def _choose_allowed(self, matcher: Matcher, logits: Scores) -> int:
        """Chooses as without a grammar if that token is allowed: it mostly is, and checking one token is
        faster than computing all allowed ones. Doesn't change the logits: other answers may use them too."""
        token = int(logits.argmax()) if self.greedy else self._draw(np.arange(self.n_vocab), logits)
        if not matcher.allows(token):
            allowed = matcher.allowed()
            scores = logits[allowed]
            token = int(allowed[scores.argmax()]) if self.greedy else self._draw(allowed, scores)
        matcher.accept(token)
        if not self.greedy:
            lib.llama_sampler_accept(self.chain, token)
        return token

    def _draw(self, tokens: Tokens, scores: Scores) -> int:
        candidates = np.zeros(len(tokens), dtype=CANDIDATE)
        candidates["id"], candidates["logit"] = tokens, scores
        data = candidates.ctypes.data_as(ctypes.POINTER(lib.llama_token_data))
        array = lib.llama_token_data_array(data, len(candidates), -1, False)
        lib.llama_sampler_apply(self.chain, ctypes.byref(array))
        # If all probabilities are 0, nothing is selected.
        return int(array.data[array.selected].id) if 0 <= array.selected < array.size else int(tokens[0])

    def close(self) -> None:
        lib.llama_sampler_free(self.chain)


def _biases(sampling: Sampling, vocab: Any) -> dict[int, float]:
    if not sampling.ignore_eos:
        return sampling.logit_bias
    return sampling.logit_bias | dict.fromkeys(end_tokens(vocab), -math.inf)


@lru_cache(maxsize=1)
def end_tokens(vocab: Any) -> list[int]:
    """All tokens that end an answer. One cache entry suffices: a worker has one vocabulary."""
    return [token for token in range(lib.llama_vocab_n_tokens(vocab)) if lib.llama_vocab_is_eog(vocab, token)]
