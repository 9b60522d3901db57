"""Values in request bodies: text, long lists, token ids and logprobs."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, StrictInt

from headstart.contents import Many, Utf8

__all__ = ["Many", "Utf8"]


# A client that biases a large part of a vocabulary needs a grammar instead.
MOST_BIASED = 1024
MOST_LOGPROBS = 20

TokenId = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]
BiasedId = Annotated[int, Field(ge=0, lt=1 << 31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[dict[BiasedId, Bias], Field(max_length=MOST_BIASED)]
TopLogprobs = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]


def _count(value: object) -> object:
    """Converts False to None. Raises ValueError for True, which only chats accept."""
    if value is True:
        raise ValueError("Input should be the number of likeliest tokens to return")
    return None if value is False else value


LegacyLogprobs = Annotated[TopLogprobs | None, BeforeValidator(_count)]
