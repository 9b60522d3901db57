"""A stored response whose record is none is one that isn't there, and nothing worse."""

from __future__ import annotations

import json
from typing import Any

import pytest

from conftest import StartServer
from headers import header_of, with_entry
from servers import RunningServer, eventually

BODY = {"model": "toy", "input": "Who keeps the lighthouse?", "max_output_tokens": 4}


def respond(server: RunningServer, **more: Any) -> str:
    response = server.post("/v1/responses", **BODY, **more)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


RECORDS: dict[str, Any] = {
    "no-json": "{",
    "a-list": "[]",
    "negative-opening": json.dumps({"body": {}, "opening": -1}),
    "opening-is-a-text": json.dumps({"body": {}, "opening": "1"}),
    "instructions-are-a-number": json.dumps({"body": {"instructions": 5}}),
    "instructions-are-parts": json.dumps({"body": {"instructions": [{"type": "text"}]}}),
    "caches-are-numbers": json.dumps({"body": {}, "caches": [1]}),
    "deep": json.dumps({"body": nested(400)}),
    "deeper": '{"body":' + '{"a":' * 100_000,
    "absent": None,
}


@pytest.mark.slow
def test_a_record_that_is_none_is_a_response_that_is_not_there(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    good, bad = respond(server), respond(server)
    path = server.cache_dir / "toy" / f"{bad}.headstart"
    eventually(path.exists)
    whole = path.read_bytes()
    terms = json.loads(header_of(whole)["__metadata__"]["entry"])["terms"]
    for record in RECORDS.values():
        metadata = {} if record is None else {"response": record}
        path.write_bytes(with_entry(whole, terms={**terms, "metadata": metadata}))
        assert server.http.get(f"/v1/responses/{bad}").status_code == 404
        continued = server.post("/v1/responses", **BODY, previous_response_id=bad, instructions="x")
        assert continued.status_code == 404, continued.text
        assert server.http.get(f"/v1/responses/{good}").status_code == 200
        respond(server, previous_response_id=good)
        assert server.http.get("/v1/cache").status_code == 200
        server.chat("Who?", max_tokens=1)
    path.write_bytes(whole)
    assert server.http.get(f"/v1/responses/{bad}").status_code == 200


def test_an_imported_response_is_a_cache_without_the_response(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    name = respond(server)
    eventually((server.cache_dir / "toy" / f"{name}.headstart").exists)
    content = server.http.get(f"/v1/cache/toy/{name}/file").content
    assert server.http.put("/v1/cache/toy/taken/file", content=content).status_code == 200
    shown = server.http.get("/v1/cache/toy/taken").json()
    assert (shown["origin"], shown["metadata"]) == ("client", {})
    assert server.http.get("/v1/responses/taken").status_code == 404
