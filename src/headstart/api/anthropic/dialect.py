"""Anthropic's API in the list of dialects."""

from __future__ import annotations

from headstart.api.anthropic.errors import anthropic_body
from headstart.api.anthropic.routes import router
from headstart.api.anthropic.schema import ANSWERS
from headstart.api.dialect import Dialect

ANTHROPIC = Dialect(
    prefixes=("/v1/messages",),
    routers=[router],
    answers=ANSWERS,
    error_body=anthropic_body,
    request_id_header="request-id",
    generates=True,
)
