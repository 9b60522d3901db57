"""Texts to token ids and back, for clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from headstart.service.models.tenant_model import TenantModel

T = TypeVar("T")

# So many tokens are processed in less than a millisecond.
MANY = 2000


async def tokenised(
    model: TenantModel, texts: Sequence[str], *, special: bool = True, parse_special: bool = True
) -> list[list[int]]:
    """The tokens of each text. `special`: with the control tokens that the model adds around a prompt.
    Nothing is remembered of the texts. Raises BadRequest or Unavailable."""
    return await model.prompts.plain(texts, first=special, special=parse_special)


async def worked_out(work: Callable[[], T], n_tokens: int) -> T:
    """The result of `work` on so many tokens; for many, run in another thread, so that the event loop isn't
    blocked."""
    return work() if n_tokens <= MANY else await asyncio.to_thread(work)


def pieces(model: TenantModel, tokens: Sequence[int]) -> list[bytes]:
    """The bytes of text from which each of these token ids, all of them the model's, was made."""
    return [model.vocabulary.written(token) for token in tokens]
