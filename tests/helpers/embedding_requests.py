"""Requests for embeddings and tokens."""

from __future__ import annotations

from typing import Any

from servers import RunningServer

Json = dict[str, Any]


def embed(server: RunningServer, given: Any, model: str = "toy", **more: Any) -> Json:
    response = server.post("/v1/embeddings", model=model, input=given, **more)
    assert response.status_code == 200, response.text
    return response.json()


def vectors(server: RunningServer, given: Any, model: str = "toy") -> list[list[float]]:
    return [item["embedding"] for item in embed(server, given, model)["data"]]


def tokens(server: RunningServer, text: str, model: str = "toy") -> list[int]:
    response = server.post("/tokenize", model=model, content=text, add_special=True)
    assert response.status_code == 200, response.text
    return list(response.json()["tokens"])
