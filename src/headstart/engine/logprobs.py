"""Probabilities of the next token."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# The natural logarithm of each token's probability; float32.
Logprobs = npt.NDArray[np.float32]


def log_softmax(logits: npt.NDArray[Any]) -> Logprobs:
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum(dtype=np.float64)), dtype=np.float32)


def likeliest(logprobs: Logprobs, n: int) -> list[tuple[int, float]]:
    """The `n` likeliest tokens, the likeliest first."""
    n = min(n, len(logprobs))
    if n == 0:
        return []
    best = np.argpartition(logprobs, -n)[-n:]
    ordered = best[np.argsort(-logprobs[best], kind="stable")]
    return [(int(token), float(logprobs[token])) for token in ordered]
