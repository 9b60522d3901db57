"""Pools the embeddings of an input's tokens into one."""

from __future__ import annotations

from typing import Any, Literal

import llama_cpp as lib
import numpy as np
from numpy.typing import NDArray

from headstart.engine.llama.gguf import metadata
from headstart.engine.model import ModelError

Pooling = Literal["mean", "first", "last"]
POOLINGS: dict[str, Pooling] = {
    str(lib.LLAMA_POOLING_TYPE_MEAN): "mean",
    str(lib.LLAMA_POOLING_TYPE_CLS): "first",
    str(lib.LLAMA_POOLING_TYPE_LAST): "last",
}


def pooling_of(model: Any) -> Pooling | None:
    """The pooling in the model's file, the mean if there is none; None for a model that ranks texts."""
    kind = metadata(model, f"{metadata(model, 'general.architecture')}.pooling_type")
    return None if kind == str(lib.LLAMA_POOLING_TYPE_RANK) else POOLINGS.get(kind, "mean")


class Pooled:
    """Accumulates the embeddings of tokens. Pieces must be added in order."""

    def __init__(self, pooling: Pooling) -> None:
        self.pooling = pooling
        self.total: NDArray[np.float64] | None = None

    def add(self, rows: NDArray[np.float32]) -> None:
        """Adds `rows`, the embeddings of the next tokens."""
        match self.pooling:
            case "mean":
                # The sum has the same direction as the mean.
                total = rows.sum(axis=0, dtype=np.float64)
                self.total = total if self.total is None else self.total + total
            case "first" if self.total is None:
                self.total = rows[0].astype(np.float64)
            case "last":
                self.total = rows[-1].astype(np.float64)

    def vector(self) -> bytes:
        """The pooled embedding, of length 1, as little-endian float32. Raises ModelError if it has no
        direction."""
        assert self.total is not None
        length = np.linalg.norm(self.total)
        if not np.isfinite(length) or length == 0:
            raise ModelError("what the model computed has no direction")
        return (self.total / length).astype("<f4").tobytes()
