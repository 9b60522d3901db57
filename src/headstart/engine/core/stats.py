"""The events and statistics of a sequence."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from headstart.engine.core.sequence import Sequence
from headstart.protocol import Progress, Stats, Token

if TYPE_CHECKING:
    from headstart.engine.logprobs import Logprobs


def token_event(sequence: Sequence, token: int, logprobs: Logprobs | None) -> Token:
    """The event for the sequence's next token, with probabilities if there are any."""
    if logprobs is None:
        return Token(sequence.request.id, token)
    # numpy is imported for requests of probabilities only.
    from headstart.engine.logprobs import likeliest

    top = likeliest(logprobs, sequence.request.sampling.logprobs or 0)
    return Token(sequence.request.id, token, float(logprobs[token]), top)


def progress_event(sequence: Sequence) -> Progress:
    """The event for what is prefilled up to now."""
    ms = 1000 * (monotonic() - sequence.restored)
    return Progress(sequence.request.id, sequence.computed, sequence.n_prompt, sequence.cached, ms)


def stats(sequence: Sequence, saved_bytes: int = 0, saved_blake3: str = "") -> Stats:
    """The statistics up to now."""
    now = monotonic()
    placed = sequence.placed or now
    restored = sequence.restored or placed
    first = sequence.first_token or now
    return Stats(
        prompt_tokens=sequence.n_prompt,
        cached_tokens=sequence.cached,
        evaluated_tokens=sequence.evaluated,
        generated_tokens=sequence.n_generated,
        source=sequence.source,
        restored_bytes=sequence.restored_bytes,
        saved_bytes=saved_bytes,
        saved_blake3=saved_blake3,
        queue_ms=1000 * (placed - sequence.arrived),
        restore_ms=1000 * (restored - placed),
        prefill_ms=1000 * (first - restored),
        decode_ms=1000 * (now - first),
        ttft_ms=1000 * (first - sequence.arrived),
    )
