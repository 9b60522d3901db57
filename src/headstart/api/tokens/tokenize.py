"""/tokenize, /detokenize and /apply-template, compatible with llama-server."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import FailFast, Field, StrictInt
from starlette.responses import Response

from headstart.api.context import owner
from headstart.api.fields.generation import Body, Messages
from headstart.api.fields.tools import Tools
from headstart.api.fields.values import Utf8
from headstart.errors import BadRequest
from headstart.service.generation.tokenize import pieces, tokenised, worked_out
from headstart.service.interface.text import check_tokens
from headstart.service.models.tenant_model import TenantModel
from headstart.service.service import Service

router = APIRouter()

Json = dict[str, Any]


class ModelRequest(Body):
    model: Utf8 | None = Field(None, description="May be omitted if the server has only one model.")


class TokenizeRequest(ModelRequest):
    content: Utf8 | None = Field(None, description="The text.")
    prompt: Utf8 | None = Field(None, description="The same as `content`.")
    add_special: bool = Field(
        False, description="Add the special tokens that the model expects around a prompt."
    )
    parse_special: bool = Field(True, description="False: treat the text of control tokens as plain text.")
    with_pieces: bool = Field(False, description="Return each token with its text.")

    def text(self) -> str:
        """The text. Raises BadRequest unless exactly one of `content` and `prompt` is set."""
        if (self.content is None) == (self.prompt is None):
            raise BadRequest("Send the text as content or as prompt.", param="content")
        return self.prompt or "" if self.content is None else self.content


class DetokenizeRequest(ModelRequest):
    # Validation stops at the first invalid item: a long list would give as many errors.
    tokens: Annotated[list[StrictInt], FailFast()] = Field(description="Token ids of the model's vocabulary.")


class TemplateRequest(ModelRequest):
    messages: Messages = Field(min_length=1, description="The messages, as in chat completions.")
    tools: Tools | None = Field(None, description="Functions that the model may call.")


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """Converts a text to token ids."""
    service: Service = request.app.state.service
    async with service.models.use(_meant(request, body)) as model:
        (tokens,) = await tokenised(
            model, [body.text()], special=body.add_special, parse_special=body.parse_special
        )

        def written() -> bytes:
            listed = _shown(model, tokens) if body.with_pieces else tokens
            return msgspec.json.encode({"tokens": listed, "n": len(tokens)})

        content = await worked_out(written, len(tokens))
        return Response(content, media_type="application/json")


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> Json:
    """Converts token ids to text."""
    service: Service = request.app.state.service
    async with service.models.use(_meant(request, body)) as model:

        def written() -> str:
            check_tokens(model.vocabulary, body.tokens, param="tokens")
            return b"".join(pieces(model, body.tokens)).decode(errors="replace")

        return {"content": await worked_out(written, len(body.tokens))}


@router.post("/apply-template")
async def apply_template(request: Request, body: TemplateRequest) -> Json:
    """Renders messages as a prompt with the model's chat template."""
    service: Service = request.app.state.service
    async with service.models.use(_meant(request, body)) as model:
        messages = [message.plain() for message in body.messages]
        return {"prompt": await model.prompts.rendered(messages, body.tools or [])}


def _meant(request: Request, body: ModelRequest) -> TenantModel:
    """The requested model. Raises ModelNotFound, or BadRequest if none of several is named."""
    service: Service = request.app.state.service
    if body.model is not None:
        return service.resolve(body.model, owner(request)).model
    if len(service.models.all) != 1:
        raise BadRequest(f"Name a model: this server has {', '.join(service.names())}.", param="model")
    return next(iter(service.models.all.values())).for_owner(owner(request))


def _shown(model: TenantModel, tokens: list[int]) -> list[Json]:
    """A piece that is not valid UTF-8 alone is returned as a list of bytes, as in llama-server."""
    return [
        {"id": token, "piece": _text(piece)}
        for token, piece in zip(tokens, pieces(model, tokens), strict=True)
    ]


def _text(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
