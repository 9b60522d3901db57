"""The cost model of one call of llama_decode, from timed calls.

    milliseconds = pass_ms + n * (token_ms + depth * attend_ms)

for `n` tokens, where `depth` is the sequence's number of tokens, these included.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np


class Sample(NamedTuple):
    n: int
    depth: int
    ms: float


class Costs(NamedTuple):
    pass_ms: float
    token_ms: float
    attend_ms: float


def fit(samples: Seq[Sample]) -> Costs:
    """Fits by least squares of relative errors, so that short calls count as much as long ones. No cost is
    negative: one that would be is set to 0 and the others are fitted again."""
    terms = np.array([(1.0, sample.n, sample.n * sample.depth) for sample in samples])
    ms = np.array([max(sample.ms, 1e-6) for sample in samples])
    costs = np.zeros(3)
    kept = [0, 1, 2]
    while kept:
        # Terms differ by orders of magnitude: each is scaled to at most 1.
        relative = terms[:, kept] / ms[:, None]
        scale = relative.max(axis=0)
        found = np.linalg.lstsq(relative / scale, np.ones(len(ms)), rcond=None)[0] / scale
        if (found >= 0).all():
            costs[kept] = found
            break
        del kept[int((found * scale).argmin())]
    return Costs(*map(float, costs))
