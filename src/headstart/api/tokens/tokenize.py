"""/tokenize, /detokenize and /apply-template, as llama-server has them."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import FailFast, Field, StrictInt
from starlette.responses import Response

from headstart.api.context import seen
from headstart.api.fields.generation import Body, Messages
from headstart.api.fields.tools import Tools
from headstart.api.fields.values import Utf8
from headstart.errors import BadRequest
from headstart.service.generation.tokenize import pieces, tokenised, worked_out
from headstart.service.interface.text import check_tokens
from headstart.service.models.model import ServedModel
from headstart.service.service import Service

router = APIRouter()

Json = dict[str, Any]


class ModelRequest(Body):
    model: Utf8 | None = Field(None, description="May be left out where the server has one model.")


class TokenizeRequest(ModelRequest):
    content: Utf8 | None = Field(None, description="The text.")
    prompt: Utf8 | None = Field(None, description="The same as `content`.")
    add_special: bool = Field(False, description="With the tokens that the model wants around a prompt.")
    parse_special: bool = Field(True, description="False: what looks like a control token is text.")
    with_pieces: bool = Field(False, description="Tell of each token what it stands for.")

    def text(self) -> str:
        """Raises BadRequest where there is none, or there are two."""
        if (self.content is None) == (self.prompt is None):
            raise BadRequest("Send the text as content or as prompt.", param="content")
        return self.prompt or "" if self.content is None else self.content


class DetokenizeRequest(ModelRequest):
    # Of a long list that has none of them, the first is enough.
    tokens: Annotated[list[StrictInt], FailFast()] = Field(description="Token ids of the model.")


class TemplateRequest(ModelRequest):
    messages: Messages = Field(min_length=1, description="The chat, as chats have it.")
    tools: Tools | None = Field(None, description="Functions that the model may call.")


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """The token ids of a text."""
    service: Service = request.app.state.service
    async with service.models.use(_meant(request, body)) as model:
        (tokens,) = await tokenised(
            model, [body.text()], special=body.add_special, parse_special=body.parse_special
        )

        def written() -> bytes:
            told = _shown(model, tokens) if body.with_pieces else tokens
            return msgspec.json.encode({"tokens": told, "n": len(tokens)})

        content = await worked_out(written, len(tokens))
        return Response(content, media_type="application/json")


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> Json:
    """The text that token ids stand for."""
    service: Service = request.app.state.service
    async with service.models.use(_meant(request, body)) as model:

        def said() -> str:
            check_tokens(model.vocabulary, body.tokens, param="tokens")
            return b"".join(pieces(model, body.tokens)).decode(errors="replace")

        return {"content": await worked_out(said, len(body.tokens))}


@router.post("/apply-template")
async def apply_template(request: Request, body: TemplateRequest) -> Json:
    """The prompt that the model's chat template makes of messages."""
    service: Service = request.app.state.service
    async with service.models.use(_meant(request, body)) as model:
        messages = [message.plain() for message in body.messages]
        return {"prompt": await model.prompts.rendered(messages, body.tools or [])}


def _meant(request: Request, body: ModelRequest) -> ServedModel:
    """Raises ModelNotFound, and BadRequest where none is named of several."""
    service: Service = request.app.state.service
    if body.model is not None:
        return seen(request, service.target(body.model)[0])
    if len(service.models.all) != 1:
        raise BadRequest(f"Name a model: this server has {', '.join(service.names())}.", param="model")
    return seen(request, next(iter(service.models.all.values())))


def _shown(model: ServedModel, tokens: list[int]) -> list[Json]:
    """A piece that is no text by itself is told by its bytes, as llama-server does."""
    return [
        {"id": token, "piece": _text(piece)}
        for token, piece in zip(tokens, pieces(model, tokens), strict=True)
    ]


def _text(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
