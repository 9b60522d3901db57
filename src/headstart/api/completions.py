"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from msgspec import structs
from starlette.responses import Response

from headstart.api.answers import Chat, Completion, stream, whole
from headstart.api.routes import addressed
from headstart.api.schemas import (
    COMPLETION_MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
)
from headstart.api.streaming import BEGIN_SECONDS, EventStream, begun, while_connected
from headstart.service.preparation import Options, Prepared
from headstart.service.server import Service

router = APIRouter(prefix="/v1")

EXPLAIN_HEADER = "x-headstart-explain"


@router.post("/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answers a chat; with `use_cache` it begins as the named caches do."""
    service: Service = request.app.state.service
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    messages = [message.plain() for message in body.messages]
    async with service.models.use(addressed(request, body)) as model:
        options = await _options(request, body, limit)
        prepared = await service.preparation.chat(model, messages, options, body.tools)
        return await _answer(request, body, prepared, Chat(body.model))


@router.post("/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continues a text; with `use_cache` the named prompt goes before it."""
    service: Service = request.app.state.service
    limit = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    async with service.models.use(addressed(request, body)) as model:
        prepared = await service.preparation.text(model, body.text(), await _options(request, body, limit))
        return await _answer(request, body, prepared, Completion(body.model))


async def _options(request: Request, body: GenerationRequest, max_tokens: int | None) -> Options:
    """The body's; the explanation may be asked for by a header as well."""
    options = body.options(max_tokens)
    if wanted := body.wanted():
        service: Service = request.app.state.service
        await service.grammars.check(wanted.grammar, wanted.param)
        options = replace(options, sampling=structs.replace(options.sampling, grammar=wanted.grammar))
    asked = request.headers.get(EXPLAIN_HEADER, "").lower() in ("1", "true")
    return replace(options, explain=options.explain or asked)


async def _answer(request: Request, body: GenerationRequest, prepared: Prepared, shape: Chat) -> Response:
    service: Service = request.app.state.service
    events = service.generation.run(prepared)
    if body.stream:
        started = await begun(request, events, BEGIN_SECONDS)
        return EventStream(stream(started, shape, prepared.submit.n, body.include_usage))
    return JSONResponse(await while_connected(request, whole(events, shape, prepared.submit.n)))
