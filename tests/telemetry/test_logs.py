"""The log has one line a request, and no prompt and no key at any level."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import StartServer
from servers import RunningServer, eventually

CHAT = "/v1/chat/completions"
CACHE = "/v1/cache/toy"
PROMPT = "The treasure lies under the old oak. " * 20
QUESTION = "Where is the parrot?"
KEYS = 'keys = {bob = {key = "bob-secret-0123"}}\n'
Json = dict[str, Any]


def _lines(server: RunningServer) -> list[Json]:
    lines = server.log.read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def _line(server: RunningServer, request_id: str) -> Json:
    """The line about a request, which is written before its answer ends."""
    found = [line for line in _lines(server) if line.get("request_id") == request_id]
    (line,) = [line for line in found if line["event"] in ("answered", "not answered", "refused")]
    return line


@pytest.fixture
def server(start_server: StartServer, tmp_path: Path) -> RunningServer:
    config = tmp_path / "headstart.toml"
    config.write_text(f'log_level = "debug"\nlog_format = "json"\n{KEYS}')
    return start_server("--config", str(config), "--model", "toy=toy:ms_per_token=1,eos=0")


def _ask(server: RunningServer, request_id: str, path: str = CHAT, **body: Any) -> Json:
    headers = {"authorization": "Bearer bob-secret-0123", "x-request-id": request_id}
    if path != CACHE:
        body = {"model": "toy", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4, **body}
    answer: Json = server.http.post(path, headers=headers, json=body).json()
    return answer


def test_each_request_has_one_line_that_says_what_its_answer_says(server: RunningServer) -> None:
    created = _ask(server, "make", CACHE, cache_name="oak", prompt=PROMPT)
    assert created["cache_name"] == "oak"
    usage = _ask(server, "hit", use_cache="oak")["usage"]
    line = _line(server, "hit")
    assert line["level"] == "info"
    assert (line["model"], line["key"]) == ("toy", "bob")
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert line["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] > 0
    assert line["generated_tokens"] == usage["completion_tokens"]
    assert (line["source"], line["miss_reason"]) == ("slot", None)
    assert 0 <= line["queue_ms"] <= line["first_token_ms"] <= line["total_ms"]
    _ask(server, "miss", use_cache="oak", cache_prompt=False)
    assert _line(server, "miss")["miss_reason"] == "cache_prompt_false"
    _ask(server, "none", use_cache="elm")
    refused = _line(server, "none")
    assert (refused["event"], refused["error"]) == ("refused", "cache_not_found")


def test_a_request_whose_worker_dies_has_its_line_too(server: RunningServer) -> None:
    headers = {"authorization": "Bearer bob-secret-0123", "x-request-id": "dead"}
    body = {"model": "toy", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
    with server.http.stream("POST", CHAT, headers=headers, json={**body, "max_tokens": 4000}) as response:
        lines = response.iter_lines()
        next(lines)
        server.workers()[0].kill()
        for _ in lines:
            pass
    assert _line(server, "dead")["error"] == "engine_died"


@pytest.mark.slow
def test_no_line_has_a_prompt_or_a_key(server: RunningServer) -> None:
    _ask(server, "make", CACHE, cache_name="oak", prompt=PROMPT)
    _ask(server, "hit", use_cache="oak", save_as="talk")
    _ask(server, "odd", response_format={"type": "regex", "regex": "parrot("})
    _ask(server, "bad", temperature="parrot")
    _ask(server, "messages", "/v1/messages", system="treasure under the oak")
    _ask(server, "responses", "/v1/responses", input=QUESTION)
    eventually(lambda: len(_lines(server)) > 5)
    for word in ("treasure", "parrot", "bob-secret"):
        assert word not in server.log.read_text()


def test_text_is_for_reading(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:eos=0", env={"HEADSTART_LOG_LEVEL": "info"})
    server.post(CHAT, model="toy", messages=[{"role": "user", "content": "Hi"}], max_tokens=4)
    (line,) = [line for line in server.log.read_text().splitlines() if "answered" in line]
    assert "[info" in line
    assert "model=toy" in line
    assert "generated_tokens=4" in line
