"""Attributes of a request's span, by the GenAI semantic conventions and, under `headstart.`, our own. They
hold names, counts and settings; no text of a prompt or an answer, and no key."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.util.types import AttributeValue

from headstart.errors import HeadstartError
from headstart.service.generation.batch import joined
from headstart.service.interface.answer import Result
from headstart.service.interface.observer import ABANDONED, Answered, Submitted
from headstart.service.interface.options import Options

PROVIDER = "headstart"
OPERATIONS = {"chat": "chat", "completion": "text_completion", "embeddings": "embeddings"}

Attributes = dict[str, AttributeValue]


def of_submitted(event: Submitted, requested_model: str) -> Attributes:
    """`requested_model`: the model's name as the client wrote it."""
    found: Attributes = {
        "gen_ai.operation.name": OPERATIONS[event.form],
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": requested_model,
        "gen_ai.response.model": event.model,
    }
    if event.owner:
        found["headstart.key.name"] = event.owner
    return found | (_of_options(event.options) if event.options else {})


def _of_options(options: Options) -> Attributes:
    """The parameters in force, except stop strings, which are text."""
    sampling = options.sampling
    found: Attributes = {
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
    }
    if options.max_tokens is not None:
        found["gen_ai.request.max_tokens"] = options.max_tokens
    if sampling.seed is not None:
        found["gen_ai.request.seed"] = sampling.seed
    if options.n != 1:
        found["gen_ai.request.choice.count"] = options.n
    return found


def of_answers(events: Sequence[Answered]) -> Attributes:
    """The figures of a request with one or more prompts, combined as in its response."""
    result = joined([event.result for event in events])
    return {
        "gen_ai.response.finish_reasons": [reason for event in events for reason in event.reasons],
        "gen_ai.usage.output_tokens": result.n_tokens,
        **_of_prompt(result),
    }


def _of_prompt(result: Result) -> Attributes:
    """How much of the prompt came from which cache, or why none did."""
    stats = result.stats
    found: Attributes = {
        "gen_ai.usage.input_tokens": stats.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": stats.cached_tokens,
        "headstart.evaluated_tokens": stats.evaluated_tokens,
        "headstart.cache.source": stats.source,
        "headstart.cache.matched_tokens": result.matched,
    }
    if result.cache_hit is not None:
        found["headstart.cache.hit"] = result.cache_hit
    if result.cache_names:
        found["headstart.cache.names"] = list(result.cache_names)
    if result.miss:
        found["headstart.cache.miss_reason"] = result.miss
    return found


def error_type(error: BaseException | None) -> str:
    """The error's code as its response has it; never its message, which may quote the request."""
    if isinstance(error, HeadstartError):
        return error.code or type(error).__name__
    if isinstance(error, ABANDONED):
        return "cancelled"
    return type(error).__name__ if error else "_OTHER"


def is_servers(error: BaseException | None) -> bool:
    """Whether the server is to blame: not for errors below 500, nor for clients that leave."""
    if isinstance(error, HeadstartError):
        return error.status >= 500
    return not isinstance(error, ABANDONED)
