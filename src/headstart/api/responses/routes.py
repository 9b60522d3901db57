"""POST /v1/responses, and stored responses."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from headstart.api.context import addressed, explaining, owner
from headstart.api.fields.answer_format import shaped, while_preparing
from headstart.api.responses.request import ResponseRequest, echoed_fields
from headstart.api.responses.response import Writer
from headstart.api.sse import BEGIN_SECONDS, EventStream, as_named_event, begun, while_connected
from headstart.errors import BadRequest, HeadstartError, PreviousNotFound
from headstart.service.generation.generate import Result
from headstart.service.generation.prepared import Prepared
from headstart.service.interface.answer import Choice, Delta, Ended
from headstart.service.interface.options import Options
from headstart.service.models.model import ServedModel
from headstart.service.origins.responses import Kept, Record, instructing, n_tokens
from headstart.service.service import Service

router = APIRouter(prefix="/v1/responses")

Json = dict[str, Any]
Events = AsyncGenerator[Delta | Ended | Result, None]


@router.post("")
async def create(request: Request, body: ResponseRequest) -> Response:
    """Answers and, unless `store` is false, stores the conversation with the answer for later requests to
    continue."""
    service: Service = request.app.state.service
    said = body.said()
    asked = _asked(service, body)
    model = addressed(request, body)
    options = await shaped(request, body.options(), body.wanted())
    options = explaining(request, options)
    before = await _before(service, model, body, asked)
    writer = Writer(echoed_fields(body, options))
    if body.store is not False:
        options = replace(options, save_as=writer.body["id"])
    async with service.models.use(model) as model:
        preparing = _prepared(service, model, body, said, options, before)
        prepared = await while_preparing(request, body.tools, preparing)
        answering = Answering(service, replace(prepared, saving=None), prepared, before, writer)
        events = service.generation.run(answering.prepared)
        if body.stream:
            started = await begun(request, events, BEGIN_SECONDS)
            return EventStream(answering.stream(started), done=b"", failed=answering.failed, source=started)
        return JSONResponse(await while_connected(request, answering.whole(events)))


@router.get("/{response_id}")
async def show(request: Request, response_id: str) -> Json:
    """Returns a stored response as it was answered."""
    service: Service = request.app.state.service
    kept = await service.responses.find(owner(request), response_id, param="response_id")
    return kept.record.body


@router.delete("/{response_id}")
async def delete(request: Request, response_id: str) -> Json:
    """Deletes a stored response; responses that continued it stay."""
    service: Service = request.app.state.service
    await service.responses.delete(owner(request), response_id)
    return {"id": response_id, "object": "response", "deleted": True}


def _asked(service: Service, body: ResponseRequest) -> tuple[str, ...] | None:
    """The caches named by the request itself, not by its route or API key."""
    _, cache = service.target(body.model)
    return body.names if body.use_cache is not None or cache is None else (cache,)


async def _before(
    service: Service, model: ServedModel, body: ResponseRequest, asked: tuple[str, ...] | None
) -> Kept | None:
    """The response that the request continues. Raises PreviousNotFound, or BadRequest if the request names
    caches other than those that this response began with."""
    if body.previous_response_id is None:
        return None
    param = "previous_response_id"
    name = body.previous_response_id
    kept = await service.responses.find(model.owner, name, param=param, error=PreviousNotFound)
    if asked is not None and asked != tuple(kept.record.caches):
        began = ", ".join(map(repr, kept.record.caches)) or "no cache"
        raise BadRequest(
            f"The response {name!r} began with {began}, and what goes on from it begins as it did: leave "
            "use_cache out.",
            param="use_cache",
        )
    return kept


async def _prepared(
    service: Service,
    model: ServedModel,
    body: ResponseRequest,
    said: list[Json],
    options: Options,
    before: Kept | None,
) -> Prepared:
    messages = [*instructing(body.instructions), *said]
    if before:
        messages = service.responses.continued(before, body.instructions, said)
        options = service.responses.options(options, before, model)
    try:
        return await service.preparation.chat(model, messages, options, body.tools)
    except BadRequest as error:
        # The error is about the chat that the request was converted to.
        error.param = "input" if error.param == "messages" else error.param
        raise


@dataclass
class Answering:
    """The answer to one request, written as it is generated and stored when complete. `asked.saving`: how to
    store it. `before`: the response that it continues."""

    service: Service
    prepared: Prepared
    asked: Prepared
    before: Kept | None
    writer: Writer

    async def whole(self, events: Events) -> Json:
        async for written in self._written(events):
            for _ in written:
                pass
        return self.writer.body

    async def stream(self, events: Events) -> AsyncGenerator[bytes, None]:
        yield _encoded(self.writer.begun())
        try:
            async for written in self._written(events):
                if encoded := _encoded(written):
                    yield encoded
        except HeadstartError as error:
            yield self.failed(error)

    def failed(self, error: HeadstartError) -> bytes:
        return _encoded(self.writer.failed(error))

    async def _written(self, events: Events) -> AsyncGenerator[Iterator[Json], None]:
        """Iterators of events, each to be consumed before the next is requested."""
        answer = Choice(0)
        async with aclosing(events):
            async for event in events:
                if not isinstance(event, Result):
                    answer.add(event)
                    yield self.writer.grown(event)
                    continue
                n_reasoning = await n_tokens(self.prepared.model, answer.reasoning)
                last = list(self.writer.finished(event, n_reasoning))
                self._keep(answer)
                yield iter(last)

    def _keep(self, answer: Choice) -> None:
        if self.asked.saving:
            self.service.responses.keep(self.asked.saving, answer, self._record())

    def _record(self) -> Record:
        if self.before:
            return msgspec.structs.replace(self.before.record, body=self.writer.body)
        entry = self.prepared.entry
        opening = len(entry.content.opening) if entry else 0
        return Record(self.writer.body, opening, self.prepared.names)


def _encoded(events: Iterator[Json]) -> bytes:
    return b"".join(map(as_named_event, events))
