"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from headstart.api.answer import answer
from headstart.api.completions.request import COMPLETION_MAX_TOKENS, ChatRequest, CompletionRequest
from headstart.api.completions.response import ChatWriter, TextWriter
from headstart.api.context import admit, explaining
from headstart.api.fields.answer_format import while_preparing
from headstart.api.fields.generation import GenerationRequest
from headstart.service.generation.batch import together
from headstart.service.interface.options import Options
from headstart.service.service import Service

router = APIRouter(prefix="/v1")


@router.post("/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answers a chat. With `use_cache` its prompt begins with the content of the named caches."""
    service: Service = request.app.state.service
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    messages = [message.plain() for message in body.messages]
    target = admit(request, body)
    async with service.models.use(target.model) as model:
        options = await _options(request, body, limit, target.caches)
        preparing = service.generation.chat(model, messages, options, body.tools)
        prepared = await while_preparing(request, options, body.tools, preparing)
        events = service.generation.run(prepared)
        writer = ChatWriter(body.model, options.n, include_usage=body.include_usage)
        return await answer(request, events, writer, stream=body.stream)


@router.post("/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continues a text. With `use_cache` the text of the named caches precedes it."""
    service: Service = request.app.state.service
    limit = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    target = admit(request, body)
    async with service.models.use(target.model) as model:
        options = await _options(request, body, limit, target.caches)
        texts = body.texts(target.caches)
        preparing = service.generation.texts(model, texts, options)
        prepared = await while_preparing(request, options, None, preparing)
        runs = [service.generation.run(each) for each in prepared]
        events = runs[0] if len(runs) == 1 else together(runs, options.n)
        echoed = texts if body.echo else []
        echoes = [text.as_text(model.vocabulary) for text in echoed for _ in range(options.n)]
        n = len(texts) * options.n
        writer = TextWriter(body.model, n, include_usage=body.include_usage, echoes=echoes)
        return await answer(request, events, writer, stream=body.stream)


async def _options(
    request: Request, body: GenerationRequest, max_tokens: int | None, caches: tuple[str, ...] | None
) -> Options:
    # Translating a long grammar takes a third of a second.
    grammar = await asyncio.to_thread(body.answer_grammar) if body.has_grammar else None
    return explaining(request, body.options(max_tokens, caches, grammar))
