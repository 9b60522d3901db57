"""OpenAI's Responses API in the list of dialects."""

from __future__ import annotations

from headstart.api.dialect import Dialect
from headstart.api.responses.routes import router
from headstart.api.responses.schema import ANSWERS

RESPONSES = Dialect(
    prefixes=("/v1/responses",),
    routers=[router],
    answers=ANSWERS,
    generates=True,
)
