"""Every error in OpenAI's one shape: {"error": {"message", "type", "param", "code", …}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from headstart.errors import BadRequest, HeadstartError, MethodNotAllowed, NotFound


def body(error: HeadstartError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
            **error.details,
        }
    }


def response(error: HeadstartError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    headers = dict(headers or {})
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if not error.retryable:
        headers["x-should-retry"] = "false"
    return JSONResponse(body(error), error.status, headers)


def install(app: FastAPI) -> None:
    @app.exception_handler(HeadstartError)
    async def _known(_: Request, error: HeadstartError) -> JSONResponse:
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return response(_from_validation(error))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        asked = f"{request.method} {request.url.path}"
        match error.status_code:
            case 404:
                known: HeadstartError = NotFound(f"There is nothing at {asked}.")
            case 405:
                known = MethodNotAllowed(f"{error.detail}: {asked}.")
                return response(known, {"allow": ", ".join(_allowed(request))})
            case status:
                known = BadRequest(f"{error.detail}: {asked}.")
                known.status = status
        return response(known, error.headers)


def _allowed(request: Request) -> list[str]:
    """The methods of all routes with the request's address; the router knows those of the first one."""
    matching = (
        route
        for route in request.app.routes
        if isinstance(route, Route) and route.matches(request.scope)[0] != Match.NONE
    )
    return sorted({method for route in matching for method in route.methods or ()})


def _from_validation(error: RequestValidationError) -> BadRequest:
    """The first problem, with the field it is about."""
    # Of the alternatives of a union, the one that got furthest is what was meant, or whose type was right.
    problem = max(error.errors(), key=lambda e: (len(e["loc"]), not e["type"].endswith("_type")))
    if problem["type"] == "json_invalid":
        return BadRequest(f"The body is not JSON: {problem['ctx']['error']}.")
    # A union reports the type of each alternative as a part of the location.
    place = [str(part) for part in problem["loc"] if part != "body"]
    place = [part for part in place if part.replace("_", "").isalnum() and part not in TYPE_NAMES]
    while place and place[-1].isdecimal():
        place.pop()
    field = ".".join(place)
    return BadRequest(f"{field or 'The body'}: {problem['msg']}.", param=field or None)


TYPE_NAMES = {"str", "TextPart", "constrained"}
