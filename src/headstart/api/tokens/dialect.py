"""Tokenising and embeddings in the list of dialects."""

from __future__ import annotations

from headstart.api.dialect import Dialect
from headstart.api.tokens import embeddings, tokenize
from headstart.api.tokens.schema import ANSWERS

TOKENS = Dialect(
    prefixes=("/v1/embeddings", "/tokenize", "/detokenize", "/apply-template"),
    routers=[embeddings.router, tokenize.router],
    answers=ANSWERS,
)
