"""Every error as an answer in the format of the dialect that the request's path belongs to."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from headstart.api.dialect import requested_dialect
from headstart.api.fields.error import openai_body
from headstart.errors import BadRequest, HeadstartError, MethodNotAllowed, NotFound

log = logging.getLogger(__name__)


class ErrorResponse(Response):
    """An error in the format of the dialect that the request's path belongs to."""

    def __init__(self, error: HeadstartError, headers: Mapping[str, str]) -> None:
        super().__init__(status_code=error.status, headers=headers)
        self.error = error
        self.more_headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = scope.get("state", {}).get("request_id")
        dialect = requested_dialect(scope)
        write = dialect.error_body if dialect else openai_body
        content = write(self.error, request_id)
        await JSONResponse(content, self.error.status, self.more_headers)(scope, receive, send)


def headers(error: HeadstartError) -> dict[str, str]:
    """Headers of the error's answer: `retry-after`, `x-should-retry`."""
    fields = {}
    if error.retry_after is not None:
        fields["retry-after"] = str(error.retry_after)
    if not error.retryable:
        fields["x-should-retry"] = "false"
    return fields


def response(error: HeadstartError, more_headers: Mapping[str, str] | None = None) -> Response:
    if not error.is_logged:
        log.info("refused", extra={"status": error.status, "error": error.log_code})
    return ErrorResponse(error, {**(more_headers or {}), **headers(error)})


def install(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """`routers`: all routers of the application."""

    @app.exception_handler(HeadstartError)
    async def _known(_: Request, error: HeadstartError) -> Response:
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        return response(_from_validation(error))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        requested = f"{request.method} {request.url.path}"
        match error.status_code:
            case 404:
                known: HeadstartError = NotFound(f"There is nothing at {requested}.")
            case 405:
                known = MethodNotAllowed(f"{error.detail}: {requested}.")
                return response(known, {"allow": ", ".join(_allowed(request, routers))})
            case status:
                known = BadRequest(f"{error.detail}: {requested}.")
                known.status = status
        return response(known, error.headers)


def _allowed(request: Request, routers: Sequence[APIRouter]) -> list[str]:
    """The methods of all routes with the path of the first matching one; Starlette reports only that
    route's."""
    routes = [route for router in routers for route in router.routes if isinstance(route, Route)]
    matching = (route.path for route in routes if route.matches(request.scope)[0] != Match.NONE)
    path = next(matching, None)
    return sorted({method for route in routes if route.path == path for method in route.methods or ()})


def _from_validation(error: RequestValidationError) -> BadRequest:
    """The most relevant problem, with its field."""
    # In a union the client meant the alternative that validated furthest, else one whose type was right.
    problem = max(error.errors(), key=lambda e: (len(e["loc"]), not e["type"].endswith("_type")))
    if problem["type"] == "json_invalid":
        return BadRequest(f"The body is not JSON: {problem['ctx']['error']}.")
    # The location includes the type of a union's alternative.
    place = [str(part) for part in problem["loc"] if part != "body"]
    place = [part for part in place if part.replace("_", "").isalnum() and part not in TYPE_NAMES]
    while place and place[-1].isdecimal():
        place.pop()
    field = ".".join(place)
    return BadRequest(f"{field or 'The body'}: {problem['msg']}.", param=field or None)


TYPE_NAMES = {"str", "TextPart", "constrained"}
