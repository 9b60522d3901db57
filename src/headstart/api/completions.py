"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from headstart.api.routes import addressed
from headstart.api.schemas import (
    COMPLETION_MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
)
from headstart.api.streaming import BEGIN_SECONDS, EventStream, as_event, begun, while_connected
from headstart.service.generation import Result, Text
from headstart.service.preparation import Options, Prepared
from headstart.service.server import Service

router = APIRouter(prefix="/v1")

Json = dict[str, Any]
# Stands for an answer's text where a chunk is encoded once for many; in no other field.
MARK = "\0"
EXPLAIN_HEADER = "x-headstart-explain"


@router.post("/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answers a chat; with `use_cache` it begins as the named caches do."""
    service: Service = request.app.state.service
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    messages = [message.plain() for message in body.messages]
    async with service.models.use(addressed(request, body)) as model:
        options = _options(request, body, limit)
        prepared = await service.preparation.chat(model, messages, options, body.tools)
        return await _answer(request, body, prepared, Chat(body.model))


@router.post("/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continues a text; with `use_cache` the named prompt goes before it."""
    service: Service = request.app.state.service
    limit = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    async with service.models.use(addressed(request, body)) as model:
        prepared = await service.preparation.text(model, body.text(), _options(request, body, limit))
        return await _answer(request, body, prepared, Completion(body.model))


def _options(request: Request, body: GenerationRequest, max_tokens: int | None) -> Options:
    """The body's; the explanation may be asked for by a header as well."""
    options = body.options(max_tokens)
    asked = request.headers.get(EXPLAIN_HEADER, "").lower() in ("1", "true")
    return replace(options, explain=options.explain or asked)


class Chat:
    """The shapes of chat completions. `id` and `created` are the same in all chunks of an answer."""

    prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str) -> None:
        self.head = {"id": self.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}

    def whole(self, text: str, result: Result) -> Json:
        account = {"usage": usage(result), **ending(result)}
        return self._object(self.object, self._choice(text, result.finish_reason)) | account

    def chunk(self, text: str | None, finish_reason: str | None) -> Json:
        return self._object(self.chunk_object, self._chunk_choice(text, finish_reason))

    def usage_chunk(self, result: Result) -> Json:
        return self._object(self.chunk_object, None) | {"usage": usage(result)}

    def opening(self) -> Json | None:
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return self._object(self.chunk_object, choice)

    def _object(self, kind: str, choice: Json | None) -> Json:
        return {"object": kind, **self.head, "choices": [] if choice is None else [choice]}

    def _choice(self, text: str, finish_reason: str) -> Json:
        message = {"role": "assistant", "content": text}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}

    def _chunk_choice(self, text: str | None, finish_reason: str | None) -> Json:
        delta = {} if text is None else {"content": text}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


class Completion(Chat):
    """The shapes of text completions, the same for chunks."""

    prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def opening(self) -> Json | None:
        return None

    def _choice(self, text: str, finish_reason: str) -> Json:
        return self._chunk_choice(text, finish_reason)

    def _chunk_choice(self, text: str | None, finish_reason: str | None) -> Json:
        return {"index": 0, "text": text or "", "logprobs": None, "finish_reason": finish_reason}


async def _answer(request: Request, body: GenerationRequest, prepared: Prepared, shape: Chat) -> Response:
    service: Service = request.app.state.service
    events = service.generation.run(prepared)
    if body.stream:
        started = await begun(request, events, BEGIN_SECONDS)
        return EventStream(stream(started, shape, body.include_usage))
    return JSONResponse(await while_connected(request, _whole(events, shape)))


async def _whole(events: AsyncGenerator[Text | Result, None], shape: Chat) -> Json:
    text = ""
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Result):
                return shape.whole(text, event)
            text += event.text
    raise AssertionError("an answer ends with its result")


async def stream(
    events: AsyncGenerator[Text | Result, None], shape: Chat, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The answer's events, together where they are sent together."""
    # OpenAI's clients expect `usage: null` on every chunk but the last once they have asked for it.
    extra: Json = {"usage": None} if include_usage else {}
    # All chunks with text are alike but for the text.
    before, after = as_event(shape.chunk(MARK, None) | extra).split(msgspec.json.encode(MARK))
    opening = shape.opening()
    # Sent with the first event, which is there when the stream begins, or late anyway.
    waiting = as_event(opening | extra) if opening else b""
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Text):
                yield waiting + before + msgspec.json.encode(event.text) + after
                waiting = b""
            else:
                last = shape.chunk(None, event.finish_reason) | extra | ending(event)
                account = as_event(shape.usage_chunk(event)) if include_usage else b""
                yield waiting + as_event(last) + account


def ending(result: Result) -> Json:
    """What is told at the end of an answer, beside its usage."""
    saved = {"saved_as": result.saved_as} if result.saved_as else {}
    told = result.explanation
    explained = {"cache_explanation": msgspec.structs.asdict(told)} if told else {}
    warned = {"sampling_warning": result.warning} if result.warning else {}
    return {"timings": timings(result), **saved, **explained, **warned}


def usage(result: Result) -> Json:
    """OpenAI's usage, and for a named cache whether the engine started from its state."""
    stats = result.stats
    account: Json = {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": result.n_tokens,
        "total_tokens": stats.prompt_tokens + result.n_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.cached_tokens},
    }
    if result.cache_hit is not None:
        account["cache_hit"] = result.cache_hit
        account["cached_prompts"] = list(result.cache_names) if result.cache_hit else []
    if result.miss:
        account["cache_miss_reason"] = result.miss
    return account


def timings(result: Result) -> Json:
    """llama-server's names, and ours for what it doesn't tell; all as the engine measured them."""
    stats = result.stats
    return {
        "cache_n": stats.cached_tokens,
        "cache_source": stats.source,
        "prefix_match_n": result.matched,
        "prompt_n": stats.evaluated_tokens,
        "prompt_ms": round(stats.prefill_ms, 3),
        "predicted_n": result.n_tokens,
        "predicted_ms": round(stats.decode_ms, 3),
        "queue_ms": round(stats.queue_ms, 3),
        "restore_ms": round(stats.restore_ms, 3),
        "ttft_ms": round(stats.ttft_ms, 3),
    }
