"""Answers to data that never becomes a request: too large, too slow, or not HTTP."""

from __future__ import annotations

import json
import uuid
from email.utils import formatdate
from http import HTTPStatus

from headstart.api import errors
from headstart.api.dialect import dialect_of
from headstart.api.dialects import DIALECTS
from headstart.api.fields.error import openai_body
from headstart.errors import HeadstartError


def refusal(error: HeadstartError, path: str) -> bytes:
    """A complete answer in the error format of the path's dialect; the connection is closed after it."""
    request_id = uuid.uuid4().hex
    dialect = dialect_of(path, DIALECTS)
    write = dialect.error_body if dialect else openai_body
    body = json.dumps(write(error, request_id), ensure_ascii=False).encode()
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
