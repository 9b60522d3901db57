"""Converts sampling parameters to the runtime's, which has no seed, no min_p and no window for penalties."""

from __future__ import annotations

from headstart.protocol import Sampling

# The runtime's top_k for "all tokens"; the thousandth token has a negligible probability.
MANY = 1000
# Replaces `top_p` 0: the most probable token alone.
LEAST_TOP_P = 1e-4
LEAST_TEMPERATURE = 1e-2
# Parameters that the runtime lacks.
UNSUPPORTED = ("min_p", "seed", "repeat_last_n")


def sampling_fields(sampling: Sampling) -> dict[str, float]:
    """Values for the fields of the same names in the runtime's structures. Greedy is top_k 1."""
    greedy = sampling.temperature == 0
    return {
        "top_k": 1 if greedy else sampling.top_k if 0 < sampling.top_k < MANY else MANY,
        "top_p": 1.0 if greedy else min(max(sampling.top_p, LEAST_TOP_P), 1.0),
        "temperature": 1.0 if greedy else max(sampling.temperature, LEAST_TEMPERATURE),
        "repeat_penalty": sampling.repeat_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "mirostat": 0,
        "mirostat_tau": 5.0,
        "mirostat_eta": 0.1,
    }
