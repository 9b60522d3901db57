"""POST /v1/embeddings."""

from __future__ import annotations

from array import array
from base64 import b64encode
from contextlib import aclosing
from sys import byteorder
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request
from pydantic import Field, JsonValue
from starlette.responses import Response

from headstart.api.context import model_of
from headstart.api.fields.generation import Body
from headstart.api.fields.values import Utf8
from headstart.api.sse import while_connected
from headstart.errors import BadRequest
from headstart.service.generation.embeddings import Input, check_dimensions, input_tokens
from headstart.service.models.tenant_model import TenantModel
from headstart.service.service import Service

router = APIRouter(prefix="/v1")

MOST_INPUTS = 2048
SHAPES = "a text, a list of texts, a list of token ids or a list of such lists"


TOKENS: JsonValue = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
INPUT_SCHEMAS: list[JsonValue] = [
    {"type": "string", "minLength": 1},
    {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MOST_INPUTS},
    TOKENS,
    {"type": "array", "items": TOKENS, "minItems": 1, "maxItems": MOST_INPUTS},
]


class EmbeddingRequest(Body):
    model: Utf8 = Field(description="A model or an alias.")
    # Checked by hand: in a union, each alternative would report every item of a long list that it rejects.
    input: Any = Field(description=f"The input: {SHAPES}.", json_schema_extra={"anyOf": INPUT_SCHEMAS})
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="The format of embeddings: numbers, or base64 of little-endian float32."
    )
    dimensions: int | None = Field(
        None, description="The model's number of dimensions; no other is accepted."
    )

    def inputs(self) -> list[Input]:
        """The inputs as a list. Raises BadRequest for another shape, or too many inputs."""
        given = self.input
        if isinstance(given, str) or (isinstance(given, list) and given and _are_tokens(given)):
            given = [given]
        if not isinstance(given, list) or not all(isinstance(one, str) or _are_tokens(one) for one in given):
            raise BadRequest(f"input: should be {SHAPES}.", param="input")
        if not 0 < len(given) <= MOST_INPUTS:
            raise BadRequest(
                f"input: has {len(given)} inputs; 1 to {MOST_INPUTS} may be sent.", param="input"
            )
        if not all(isinstance(one, list) or _is_utf8(one) for one in given):
            raise BadRequest("input: should be valid Unicode.", param="input")
        return given


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@router.post("/embeddings")
async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """Converts texts to vectors; similar texts have close vectors."""
    service: Service = request.app.state.service
    inputs = body.inputs()
    async with service.models.use(model_of(request, body.model)) as model:
        check_dimensions(model, body.dimensions)
        answer = await while_connected(request, _answer(service, body, model, inputs))
    return Response(answer, media_type="application/json")


async def _answer(service: Service, body: EmbeddingRequest, model: TenantModel, inputs: list[Input]) -> bytes:
    tokens = await input_tokens(model, inputs)
    data: list[msgspec.Raw] = []
    async with aclosing(service.generation.embed(model, tokens)) as vectors:
        async for values in vectors:
            # Encoded one by one: encoding all at once would block the event loop.
            data.append(msgspec.Raw(msgspec.json.encode(_shown(len(data), values, body.encoding_format))))
    n_tokens = sum(map(len, tokens))
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return msgspec.json.encode({"object": "list", "data": data, "model": body.model, "usage": usage})


def _shown(index: int, values: bytes, encoding: str | None) -> dict[str, Any]:
    if encoding == "base64":
        return {"object": "embedding", "index": index, "embedding": b64encode(values).decode()}
    numbers = array("f", values)
    if byteorder == "big":
        numbers.byteswap()
    return {"object": "embedding", "index": index, "embedding": numbers.tolist()}
