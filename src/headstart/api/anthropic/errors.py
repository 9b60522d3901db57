"""The format of errors in Anthropic's API: {"type": "error", "error": {"type", "message"}, "request_id"}."""

from __future__ import annotations

from typing import Any

from headstart.errors import ContextLengthExceeded, HeadstartError

# Anthropic's error types by status. Other statuses below 500 have the first type.
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_body(error: HeadstartError, request_id: str | None = None) -> dict[str, Any]:
    otherwise = "api_error" if error.status >= 500 else "invalid_request_error"
    message = error.message
    if isinstance(error, ContextLengthExceeded):
        # Agents recognise these words and shorten the conversation.
        message = "prompt is too long: {n_prompt_tokens} tokens > {n_ctx} maximum. ".format(**error.details)
        message += error.message
    content = {"type": ANTHROPIC_TYPES.get(error.status, otherwise), "message": message}
    return {"type": "error", "error": content, "request_id": request_id}
