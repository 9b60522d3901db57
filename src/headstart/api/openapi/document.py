"""/openapi.json: requests as described by FastAPI, answers as described in `answers.py`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from headstart.api.fields.reply import Answer
from headstart.api.openapi.answers import ANSWERS
from headstart.api.openapi.examples import EXAMPLES

Json = dict[str, Any]

REFERENCE = "#/components/schemas/{model}"
# FastAPI's own validation errors, which this server writes in another format.
NOT_OURS = ("HTTPValidationError", "ValidationError")
EVENTS = "A stream ends with an event whose data is `[DONE]`."


def install(app: FastAPI) -> None:
    """Makes the application build its OpenAPI document at the first request for it."""

    def described() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = document(app)
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]


def document(app: FastAPI) -> Json:
    found: Json = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = found["components"]["schemas"]
    for name in NOT_OURS:
        schemas.pop(name, None)
    answers = _answer_schemas()
    assert not schemas.keys() & answers.keys()
    schemas |= answers
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            _describe(operation, method, path)
    return found


def _answer_schemas() -> Json:
    kinds: dict[type[BaseModel], None] = dict.fromkeys(
        kind for each in ANSWERS.values() for kind in (each.whole, each.event, each.error) if kind
    )
    _, schemas = models_json_schema(
        [(kind, "serialization") for kind in kinds], ref_template=REFERENCE, by_alias=True
    )
    return dict(schemas["$defs"])


def _describe(operation: Json, method: str, path: str) -> None:
    plain = path.replace(":path}", "}")
    operation["operationId"] = f"{method} {plain}"
    operation["responses"] = _responses(ANSWERS[method, plain])
    for title, value in EXAMPLES.get((method, plain), {}).items():
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
    told = f"Done. {EVENTS}" if answer.event and answer.done else "Done."
    error = {"content": {"application/json": _content(answer.error.__name__)}}
    return {
        "200": {"description": told, "content": content},
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
