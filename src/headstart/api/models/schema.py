"""Answers of /v1/models and /health."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from headstart.api.fields.reply import Reply

State = Literal["available", "loading", "ready", "failed"]


class Model(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    state: State
    n_ctx: int | None = Field(None, description="Tokens a request may have; known once it was loaded.")
    slots: int | None = Field(None, description="Requests that run at the same time.")


class ModelList(Reply):
    object: Literal["list"]
    data: list[Model]


class Unloaded(Model):
    unloaded: bool = Field(description="Whether it was loaded.")


class Health(Reply):
    status: Literal["ok"]
    models: dict[str, State] | None = Field(None, description="Where an API key is needed: only with one.")
    caches_building: int | None = Field(None, description="Likewise; others' are told to admins only.")
