"""What /openapi.json says is what the server does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from headstart.api.dialects import DIALECTS
from servers import Json, RunningServer, events

ANSWERS = {route: answer for dialect in DIALECTS for route, answer in dialect.answers.items()}
EXAMPLES = {route: titles for dialect in DIALECTS for route, titles in dialect.examples.items()}
HOOKS = Path(__file__).parent / "schemathesis" / "hooks.py"
# Left out: our fields are lenient with types, as their clients are used to; not all that is refused can be
# written in JSON Schema; and what is under a cache's name is no name.
LEFT_OUT = "negative_data_rejection,positive_data_acceptance,unsupported_method"


@pytest.fixture(scope="module")
def document(toy: RunningServer) -> Json:
    found: Json = toy.http.get("/openapi.json").json()
    return found


@pytest.fixture(scope="module")
def known(toy: RunningServer) -> str:
    """A cache that requests may name."""
    toy.post("/v1/cache/toy", cache_name="known", prompt="You answer briefly. " * 20).raise_for_status()
    return "known"


def _check(document: Json, kind: str, answer: Any) -> None:
    """Raises ValidationError for an answer that the document does not allow."""
    schema = {"$ref": f"#/components/schemas/{kind}", "components": document["components"]}
    Draft202012Validator(schema).validate(answer)


def test_every_route_is_described(document: Json) -> None:
    described = {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert described == ANSWERS.keys()


def test_nothing_is_said_of_errors_that_are_written_otherwise(document: Json) -> None:
    for operations in document["paths"].values():
        for operation in operations.values():
            assert operation["responses"].keys() == {"200", "4XX", "5XX"}
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_every_field_of_a_request_says_what_it_is(document: Json) -> None:
    bodies = {
        operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for operations in document["paths"].values()
        for operation in operations.values()
        if "requestBody" in operation
    }
    assert len(bodies) > 5
    schemas = document["components"]["schemas"]
    reachable: set[str] = set()
    while bodies:
        body = bodies.pop()
        reachable.add(body)
        bodies |= set(re.findall(r"#/components/schemas/(\w+)", json.dumps(schemas[body]))) - reachable
    silent = [
        f"{body}.{name}"
        for body in sorted(reachable)
        for name, field in schemas[body].get("properties", {}).items()
        if not field.get("description")
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("route", "title"), [(route, title) for route, titles in EXAMPLES.items() for title in titles]
)
def test_examples_are_accepted(
    toy: RunningServer, document: Json, route: tuple[str, str], title: str
) -> None:
    for name, prompt in (("coding_assistant", "You are an expert."), ("python_context", "import numpy")):
        toy.post("/v1/cache/toy", cache_name=name, prompt=prompt).raise_for_status()
    method, path = route
    content = document["paths"][path][method]["requestBody"]["content"]["application/json"]
    body = content["examples"][title]["value"]
    body = {**body, "model": "toy", "max_tokens": 4} if "model" in body else body
    response = toy.http.request(method, path.format(model="toy"), json=body)
    assert response.status_code == 200, response.text
    answer = ANSWERS[route]
    if not body.get("stream"):
        assert answer.whole
        _check(document, answer.whole.__name__, response.json())
        return
    assert answer.event
    told = list(events(response))
    assert len(told) > 2
    for event in told:
        _check(document, answer.event.__name__, event)


def test_answers_have_no_field_that_is_not_described(toy: RunningServer, document: Json, known: str) -> None:
    chat = {"model": "toy", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 4}
    asked = chat | {"use_cache": known, "explain_cache": True}
    _check(document, "ChatCompletion", toy.post("/v1/chat/completions", **asked).json())
    _check(document, "AllCaches", toy.http.get("/v1/cache").json())
    _check(document, "CacheDetails", toy.http.get(f"/v1/cache/toy/{known}").json())
    refused = toy.post("/v1/chat/completions", model="none", messages=chat["messages"])
    _check(document, "ErrorReply", refused.json())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_generated_requests_get_described_answers(toy: RunningServer, known: str, tmp_path: Path) -> None:
    """Schemathesis: no 5xx, no status, content type or body that the document does not allow."""
    config = tmp_path / "schemathesis.toml"
    config.write_text(f'hooks = "{HOOKS}"\n')
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config)),
        *("run", f"{toy.url}/openapi.json", "--checks", "all", "--exclude-checks", LEFT_OUT),
        *("--max-examples", "20", "--generation-deterministic", "--request-timeout", "30"),
        *("--continue-on-failure", "--no-color"),
    ]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=380,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    counted = re.search(r"(\d+) generated", done.stdout)
    assert counted
    assert int(counted[1]) > 500


def test_the_page_that_shows_it_needs_no_other_server(toy: RunningServer) -> None:
    page = toy.http.get("/docs")
    assert page.status_code == 200
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(addresses) >= 2
    for address in addresses:
        assert httpx.URL(address).is_relative_url
        assert toy.http.get(address).status_code == 200
    assert "openapi.json" in page.text


def test_the_page_can_be_read_without_a_key(start_server: Any, tmp_path: Path) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text('[keys]\nalice = { key = "secret" }\n')
    server = start_server("--model", "toy=toy:", "--config", str(config))
    assert server.http.get("/docs").status_code == 200
    assert server.http.get("/openapi.json").status_code == 200
    assert server.http.get("/docs/files/swagger-ui.css").status_code == 200
    assert server.http.get("/v1/models").status_code == 401
