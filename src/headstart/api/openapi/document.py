"""/openapi.json: requests as described by FastAPI, answers as described by the dialects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from headstart.api.dialect import Dialect, RouteKey
from headstart.api.fields.reply import Answer

Json = dict[str, Any]

REFERENCE = "#/components/schemas/{model}"
# FastAPI's own validation errors, which this server writes in another format.
NOT_OURS = ("HTTPValidationError", "ValidationError")
EVENTS = "A stream ends with an event whose data is `[DONE]`."


def install(app: FastAPI, dialects: Sequence[Dialect]) -> None:
    """Makes the application build its OpenAPI document at the first request for it."""

    def described() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = document(app, dialects)
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]


def document(app: FastAPI, dialects: Sequence[Dialect]) -> Json:
    found: Json = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = found["components"]["schemas"]
    for name in NOT_OURS:
        schemas.pop(name, None)
    answers = {route: answer for dialect in dialects for route, answer in dialect.answers.items()}
    examples = {route: titles for dialect in dialects for route, titles in dialect.examples.items()}
    described = _answer_schemas(answers.values())
    assert not schemas.keys() & described.keys()
    schemas |= described
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            route = (method, path.replace(":path}", "}"))
            _describe(operation, route, answers[route], examples.get(route, {}))
    return found


def _answer_schemas(answers: Iterable[Answer]) -> Json:
    kinds: dict[type[BaseModel], None] = dict.fromkeys(
        kind for each in answers for kind in (each.whole, each.event, each.error) if kind
    )
    _, schemas = models_json_schema(
        [(kind, "serialization") for kind in kinds], ref_template=REFERENCE, by_alias=True
    )
    return dict(schemas["$defs"])


def _describe(operation: Json, route: RouteKey, answer: Answer, examples: Mapping[str, Any]) -> None:
    operation["operationId"] = " ".join(route)
    operation["responses"] = _responses(answer)
    for title, value in examples.items():
        content = operation["requestBody"]["content"]["application/json"]
        content.setdefault("examples", {})[title] = {"value": value}


def _responses(answer: Answer) -> Json:
    content: Json = {}
    if answer.whole:
        content["application/json"] = _content(answer.whole.__name__)
    else:
        content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    if answer.event:
        content["text/event-stream"] = {"schema": _event(answer.event.__name__, answer.done)}
    description = f"Done. {EVENTS}" if answer.event and answer.done else "Done."
    error = {"content": {"application/json": _content(answer.error.__name__)}}
    return {
        "200": {"description": description, "content": content},
        "4XX": {"description": "The request is refused.", **error},
        "5XX": {"description": "The server failed, or can't serve the request now.", **error},
    }


def _event(schema: str, done: str | None) -> Json:
    json = {"type": "string", "contentMediaType": "application/json", "contentSchema": _reference(schema)}
    data = {"anyOf": [{"const": done}, json]} if done else json
    event = {"type": "object", "properties": {"event": {"type": "string"}, "data": data}}
    return event | {"required": ["data"], "title": f"An event with a {schema}"}


def _content(schema: str) -> Json:
    return {"schema": _reference(schema)}


def _reference(schema: str) -> Json:
    return {"$ref": REFERENCE.format(model=schema)}
