"""POST /v1/responses, and stored responses."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from headstart.api.answer import answer
from headstart.api.context import admit, explaining, owner
from headstart.api.fields.answer_format import while_preparing
from headstart.api.responses.request import ResponseRequest, echoed_fields
from headstart.api.responses.response import ResponseWriter, new_id
from headstart.api.writer import Json
from headstart.errors import BadRequest, PreviousNotFound
from headstart.service.generation.prepare import Prepared
from headstart.service.interface.options import Keep, Options
from headstart.service.models.tenant_model import TenantModel
from headstart.service.origins.responses import StoredResponse, system_messages
from headstart.service.service import Service, Target

router = APIRouter(prefix="/v1/responses")


@router.post("")
async def create(request: Request, body: ResponseRequest) -> Response:
    """Answers and, unless `store` is false, stores the conversation with the answer for later requests to
    continue."""
    service: Service = request.app.state.service
    input_messages = body.input_messages()
    target = admit(request, body)
    keep = None if body.store is False else Keep(new_id(), body=lambda: writer.body)
    options = explaining(request, body.options(target.caches, body.answer_grammar(), keep))
    writer = ResponseWriter(keep.name if keep else new_id(), echoed_fields(body, options))
    before = await _before(service, target, body)
    async with service.models.use(target.model) as model:
        preparing = _prepared(service, model, body, input_messages, options, before)
        prepared = await while_preparing(request, options, body.tools, preparing)
        events = service.generation.run(prepared)
        return await answer(request, events, writer, stream=body.stream)


@router.get("/{response_id}")
async def show(request: Request, response_id: str) -> Json:
    """Returns a stored response as it was answered."""
    service: Service = request.app.state.service
    found = await service.responses.find(owner(request), response_id, param="response_id")
    return found.record.body


@router.delete("/{response_id}")
async def delete(request: Request, response_id: str) -> Json:
    """Deletes a stored response; responses that continued it stay."""
    service: Service = request.app.state.service
    await service.responses.delete(owner(request), response_id)
    return {"id": response_id, "object": "response", "deleted": True}


async def _before(service: Service, target: Target, body: ResponseRequest) -> StoredResponse | None:
    """The response that the request continues. Raises PreviousNotFound, or BadRequest if the request names
    caches other than those that this response began with."""
    if body.previous_response_id is None:
        return None
    param = "previous_response_id"
    name = body.previous_response_id
    found = await service.responses.find(target.model.owner, name, param=param, error=PreviousNotFound)
    named = None if target.is_default else target.caches
    if named is not None and named != tuple(found.record.caches):
        began = ", ".join(map(repr, found.record.caches)) or "no cache"
        raise BadRequest(
            f"The response {name!r} began with {began}, and what goes on from it begins as it did: leave "
            "use_cache out.",
            param="use_cache",
        )
    return found


async def _prepared(
    service: Service,
    model: TenantModel,
    body: ResponseRequest,
    input_messages: list[Json],
    options: Options,
    before: StoredResponse | None,
) -> Prepared:
    messages = [*system_messages(body.instructions), *input_messages]
    if before:
        messages = service.responses.continued(before, body.instructions, input_messages)
        options = service.responses.options(options, before, model)
    try:
        return await service.generation.chat(model, messages, options, body.tools)
    except BadRequest as error:
        # The error is about the chat that the request was converted to.
        error.param = "input" if error.param == "messages" else error.param
        raise
