"""A dialect: the routes of one API, and everything about its format that code for all routes needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.types import Scope

from headstart.api.fields.error import openai_body
from headstart.api.fields.reply import Answer
from headstart.errors import HeadstartError

# The method in lower case, and the path, of a route.
RouteKey = tuple[str, str]
ErrorBody = Callable[[HeadstartError, str | None], dict[str, Any]]


@dataclass(frozen=True)
class Dialect:
    """`prefixes`: its paths are these, and those below them. `answers`: the schemas of each route's answers.
    `examples`: titles and bodies of requests. `error_body`: writes an error and the request's id, also for a
    path that has no route. `request_id_header`: a response header with this id besides `x-request-id`.
    `generates`: whether it sends answers of a model, with an AnswerWriter."""

    prefixes: Sequence[str]
    routers: Sequence[APIRouter]
    answers: Mapping[RouteKey, Answer]
    examples: Mapping[RouteKey, Mapping[str, Any]] = field(default_factory=dict)
    error_body: ErrorBody = openai_body
    request_id_header: str | None = None
    generates: bool = False


def dialect_of(path: str, dialects: Sequence[Dialect]) -> Dialect | None:
    """The dialect of a path, with or without a route's prefix before /v1/."""
    prefix, api, rest = path.partition("/v1/")
    plain = f"{api}{rest}/" if api else f"{prefix}/"
    found = (each for each in dialects if any(plain.startswith(f"{start}/") for start in each.prefixes))
    return next(found, None)


def requested_dialect(scope: Scope) -> Dialect | None:
    """The dialect of a request's path among the application's."""
    return dialect_of(scope["path"], scope["app"].state.dialects) if "app" in scope else None
