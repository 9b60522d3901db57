"""Texts to token ids and back, as they are asked for by clients."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from headstart.prompt.prompts import QUICK
from headstart.service.model import ServedModel


async def tokenised(
    model: ServedModel, texts: Sequence[str], *, special: bool = True, parse_special: bool = True
) -> list[list[int]]:
    """The tokens of each text; `special`: with what the model wants before and after it. On another thread
    where that takes long; nothing of them is remembered. Raises ModelLoading."""
    encode = partial(model.prompts.tokenizer.encode, first=special, parse_special=parse_special)
    if sum(map(len, texts)) <= QUICK:
        return [encode(text) for text in texts]
    return await asyncio.to_thread(lambda: [encode(text) for text in texts])


async def pieces(model: ServedModel, tokens: Sequence[int]) -> list[bytes]:
    """What of a text each of the tokens, which are the model's, was made from."""
    written = model.prompts.tokenizer.written
    if len(tokens) <= QUICK:
        return [written(token) for token in tokens]
    return await asyncio.to_thread(lambda: [written(token) for token in tokens])
