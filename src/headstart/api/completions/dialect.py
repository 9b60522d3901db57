"""Chat and text completions in the list of dialects."""

from __future__ import annotations

from headstart.api.completions.examples import EXAMPLES
from headstart.api.completions.routes import router
from headstart.api.completions.schema import ANSWERS
from headstart.api.dialect import Dialect

COMPLETIONS = Dialect(
    prefixes=("/v1/chat/completions", "/v1/completions"),
    routers=[router],
    answers=ANSWERS,
    examples=EXAMPLES,
    generates=True,
)
