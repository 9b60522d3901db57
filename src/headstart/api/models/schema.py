"""Answers of /v1/models, /health, /ready and /metrics."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from headstart.api.fields.reply import Answer, Reply

ModelState = Literal["available", "loading", "ready", "failed"]


class Model(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    state: ModelState
    n_ctx: int | None = Field(
        None,
        description="Maximum tokens of a request, prompt and answer together; absent until first loaded.",
    )
    slots: int | None = Field(
        None, description="Number of requests that run at once; absent until first loaded."
    )


class ModelList(Reply):
    object: Literal["list"]
    data: list[Model]


class Unloaded(Model):
    unloaded: bool = Field(description="Whether the model was loaded before.")


class Details(Reply):
    models: dict[str, ModelState] | None = Field(
        None, description="Absent if API keys are configured and the request has none."
    )
    caches_building: int | None = Field(
        None,
        description="Builds of the key's own and of public caches, for admins all; absent like `models`.",
    )


class Health(Details):
    status: Literal["ok"]


class Readiness(Details):
    status: Literal["ready"]


# Keyed by method and path.
ANSWERS = {
    ("get", "/v1/models"): Answer(ModelList),
    ("get", "/v1/models/available"): Answer(ModelList),
    ("get", "/v1/models/loaded"): Answer(ModelList),
    ("get", "/v1/models/{name}"): Answer(Model),
    ("post", "/v1/models/load"): Answer(Model),
    ("post", "/v1/models/unload"): Answer(Unloaded),
    ("get", "/health"): Answer(Health),
    ("get", "/ready"): Answer(Readiness),
    ("get", "/metrics"): Answer(None, text=True),
}
