"""A dialect of a few lines, as in docs/extending.md, answers, streams, hits caches, and has errors and
schemas."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Request
from starlette.responses import Response

from headstart.api.answer import answer
from headstart.api.app import create_app
from headstart.api.context import admit
from headstart.api.dialect import Dialect
from headstart.api.dialects import DIALECTS
from headstart.api.fields.generation import CachedRequest
from headstart.api.fields.reply import Answer, Reply
from headstart.api.sse import COMMENT, as_event
from headstart.api.writer import Opens
from headstart.caches.entry import Content
from headstart.config.settings import Settings
from headstart.errors import HeadstartError
from headstart.protocol import Sampling
from headstart.service.interface.answer import Delta, Ended, PromptProgress, Result
from headstart.service.interface.options import Options
from headstart.service.service import Service

PROMPT = "You keep the lighthouse and answer in few words. " * 20
PATH = "/v1/ask"

# The dialect, in the order of the recipe: request, response, schema, routes, entry in the list.


class AskRequest(CachedRequest):
    question: str
    stream: bool = False


class AskWriter:
    done, keep_alive = b"", COMMENT
    opens: Opens = "with_answer"

    def __init__(self, model: str) -> None:
        self.body: dict[str, Any] = {"model": model, "answer": "", "cache_hit": None}

    def opening(self) -> Iterable[bytes]:
        return ()

    def progress(self, event: PromptProgress) -> Iterable[bytes]:
        return ()

    def add(self, event: Delta | Ended) -> Iterable[bytes]:
        text = event.text if isinstance(event, Delta) else ""
        self.body["answer"] += text
        return [as_event({"text": text})] if text else []

    def closing(self, result: Result) -> Iterable[bytes]:
        self.body["cache_hit"] = result.cache_hit
        return [as_event(self.body)]

    def failed(self, error: HeadstartError) -> Iterable[bytes]:
        return [as_event({"problem": error.message})]


class AskReply(Reply):
    model: str
    answer: str
    cache_hit: bool | None


router = APIRouter(prefix=PATH)


@router.post("")
async def ask(request: Request, body: AskRequest) -> Response:
    """Answers a question."""
    service: Service = request.app.state.service
    target = admit(request, body)
    async with service.models.use(target.model) as model:
        chat = [{"role": "user", "content": body.question}]
        options = Options(max_tokens=8, sampling=Sampling(temperature=0), use_cache=target.caches)
        prepared = await service.generation.chat(model, chat, options)
        events = service.generation.run(prepared)
        return await answer(request, events, AskWriter(body.model), stream=body.stream)


ASK = Dialect(
    prefixes=(PATH,),
    routers=[router],
    answers={("post", PATH): Answer(AskReply, event=AskReply)},
    error_body=lambda error, _: {"problem": error.message},
    generates=True,
)


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    service = Service(Settings(models={"toy": "toy:"}, cache_dir=tmp_path, tune=False))
    transport = httpx.ASGITransport(create_app(service, [*DIALECTS, ASK]))
    try:
        await service.load()
        await service.caches.create(service.model("toy"), "keeper", Content(PROMPT))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client
    finally:
        await service.close()


async def test_a_new_dialect_answers_streams_and_hits(client: httpx.AsyncClient) -> None:
    body = {"model": "toy@keeper", "question": "Who are you?"}
    whole = (await client.post(PATH, json=body)).json()
    assert whole["answer"]
    assert whole["cache_hit"] is True
    streamed = await client.post(PATH, json=body | {"stream": True})
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert "".join(event["text"] for event in events[:-1]) == whole["answer"] == events[-1]["answer"]


async def test_its_errors_have_its_own_form_and_others_keep_theirs(client: httpx.AsyncClient) -> None:
    unknown = await client.post(PATH, json={"model": "none", "question": "?"})
    assert (unknown.status_code, list(unknown.json())) == (404, ["problem"])
    invalid = await client.post(PATH, json={"model": "toy"})
    assert (invalid.status_code, list(invalid.json())) == (400, ["problem"])
    other = await client.post("/v1/chat/completions", json={"model": "toy"})
    assert list(other.json()) == ["error"]


async def test_its_route_and_answers_are_in_the_api_description(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    operation = document["paths"][PATH]["post"]
    shown = json.dumps(operation["responses"]["200"])
    assert "AskReply" in shown
    assert "AskReply" in document["components"]["schemas"]
    assert "AskRequest" in json.dumps(operation["requestBody"])
