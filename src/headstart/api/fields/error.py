"""OpenAI's format of errors: {"error": {"message", "type", "param", "code", …}}."""

from __future__ import annotations

from typing import Any

from headstart.errors import HeadstartError


def openai_body(error: HeadstartError, request_id: str | None = None) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
            **error.details,
        }
    }
