"""Answers to data that never becomes a request: too large, too slow, or not HTTP."""

from __future__ import annotations

import json
import uuid
from email.utils import formatdate
from http import HTTPStatus

from headstart.api import errors
from headstart.api.anthropic.errors import anthropic_body, is_anthropic
from headstart.errors import HeadstartError


def refusal(error: HeadstartError, path: str) -> bytes:
    """A complete answer in the error format of the path's API; the connection is closed after it."""
    request_id = uuid.uuid4().hex
    anthropic = is_anthropic(path)
    content = anthropic_body(error, request_id) if anthropic else errors.body(error)
    body = json.dumps(content, ensure_ascii=False).encode()
    headers = {
        "date": formatdate(usegmt=True),
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "x-request-id": request_id,
        **errors.headers(error),
    }
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
