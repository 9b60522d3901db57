"""Texts to token ids and back, as they are asked for by clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from headstart.service.models.model import ServedModel

T = TypeVar("T")

# Tokens that are gone through in less than a millisecond.
MANY = 2000


async def tokenised(
    model: ServedModel, texts: Sequence[str], *, special: bool = True, parse_special: bool = True
) -> list[list[int]]:
    """The tokens of each text; `special`: with what the model wants before and after it; nothing of them is
    remembered. Raises BadRequest or Unavailable."""
    return await model.prompts.plain(texts, first=special, special=parse_special)


async def worked_out(work: Callable[[], T], n_tokens: int) -> T:
    """What `work` does with so many tokens; of many, on another thread, so that the event loop goes on."""
    return work() if n_tokens <= MANY else await asyncio.to_thread(work)


def pieces(model: ServedModel, tokens: Sequence[int]) -> list[bytes]:
    """What of a text each of the tokens, which are the model's, was made from."""
    return [model.vocabulary.written(token) for token in tokens]
