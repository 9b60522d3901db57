"""The management of models in the list of dialects."""

from __future__ import annotations

from headstart.api.dialect import Dialect
from headstart.api.models.routes import router
from headstart.api.models.schema import ANSWERS

MODELS = Dialect(
    prefixes=("/v1/models", "/health", "/ready", "/metrics"),
    routers=[router],
    answers=ANSWERS,
)
