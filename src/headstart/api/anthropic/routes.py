"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from headstart.api.answer import answer
from headstart.api.anthropic.request import CountRequest, MessagesRequest
from headstart.api.anthropic.response import MessageWriter
from headstart.api.context import admit
from headstart.api.fields.answer_format import while_preparing
from headstart.service.interface.options import Options
from headstart.service.service import Service

router = APIRouter(prefix="/v1/messages")


@router.post("")
async def messages(request: Request, body: MessagesRequest) -> Response:
    """Answers a chat. The prompt's state is stored at each `cache_control` breakpoint for later requests."""
    service: Service = request.app.state.service
    chat, tools, breakpoints = body.chat()
    target = admit(request, body)
    async with service.models.use(target.model) as model:
        options = body.options(breakpoints, target.caches, body.answer_grammar())
        preparing = service.generation.chat(model, chat, options, tools)
        prepared = await while_preparing(request, options, tools, preparing)
        writer = MessageWriter(
            body.model,
            len(prepared.submit.tokens),
            prepared.plan.breakpoints,
            with_reasoning=body.shows_reasoning,
        )
        events = service.generation.run(prepared)
        return await answer(request, events, writer, stream=body.stream)


@router.post("/count_tokens")
async def count_tokens(request: Request, body: CountRequest) -> dict[str, int]:
    """Counts the prompt's tokens without evaluating them."""
    service: Service = request.app.state.service
    chat, tools, _ = body.chat()
    target = admit(request, body)
    async with service.models.use(target.model) as model:
        options = Options(use_cache=target.caches)
        return {"input_tokens": await service.generation.count(model, chat, options, tools)}
