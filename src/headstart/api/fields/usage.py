"""The figures of an answer: usage, timings and other fields at its end."""

from __future__ import annotations

from typing import Any

import msgspec

from headstart.service.interface.answer import Result

Json = dict[str, Any]


def ending(result: Result) -> Json:
    """The fields at the end of an answer, except `usage`."""
    saved = {"saved_as": result.saved_as} if result.saved_as else {}
    explanation = result.explanation
    explained = {"cache_explanation": msgspec.structs.asdict(explanation)} if explanation else {}
    warned = {"sampling_warning": result.warning} if result.warning else {}
    return {"timings": timings(result), **saved, **explained, **warned}


def usage(result: Result) -> Json:
    """OpenAI's usage and, for a named cache, whether the engine started from its state."""
    stats = result.stats
    account: Json = {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": result.n_tokens,
        "total_tokens": stats.prompt_tokens + result.n_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.cached_tokens},
    }
    if result.cache_hit is not None:
        account["cache_hit"] = result.cache_hit
        account["cached_prompts"] = list(result.cache_names) if result.cache_hit else []
    if result.miss:
        account["cache_miss_reason"] = result.miss
    return account


def timings(result: Result) -> Json:
    """Figures measured by the engine, under llama-server's names if it has them, else our own."""
    stats = result.stats
    return {
        "cache_n": stats.cached_tokens,
        "cache_source": stats.source,
        "prefix_match_n": result.matched,
        "prompt_n": stats.evaluated_tokens,
        "prompt_ms": round(stats.prefill_ms, 3),
        "predicted_n": result.n_tokens,
        "predicted_ms": round(stats.decode_ms, 3),
        "queue_ms": round(stats.queue_ms, 3),
        "restore_ms": round(stats.restore_ms, 3),
        "ttft_ms": round(stats.ttft_ms, 3),
    }
