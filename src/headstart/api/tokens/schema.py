"""Answers of /v1/embeddings, /tokenize, /detokenize and /apply-template."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from headstart.api.fields.reply import Answer, Reply


class Embedding(Reply):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Numbers, or base64 of little-endian float32.")


class EmbeddingUsage(Reply):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Reply):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Piece(Reply):
    id: int
    piece: str | list[int] = Field(
        description="The token's text, or its bytes if they are not valid UTF-8 alone."
    )


class Tokens(Reply):
    tokens: list[int] | list[Piece]
    n: int


class Detokenized(Reply):
    content: str


class Prompt(Reply):
    prompt: str


# Keyed by method and path.
ANSWERS = {
    ("post", "/v1/embeddings"): Answer(Embeddings),
    ("post", "/tokenize"): Answer(Tokens),
    ("post", "/detokenize"): Answer(Detokenized),
    ("post", "/apply-template"): Answer(Prompt),
}
