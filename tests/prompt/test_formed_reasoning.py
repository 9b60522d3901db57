"""Answers that must have a form where the template opens the reasoning: they are the answer's text."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from servers import Json, RunningServer, running_server

OPENED = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}
{{- message['content'] + '<|im_end|>\\n' }}{% endfor %}{{ '<|im_start|>assistant\\n<think>\\n' }}"""
USER = {"role": "user", "content": "How far does the light reach?"}
SCHEMA = {"const": "far"}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("formed")
    template = directory / "opened.jinja"
    template.write_text(OPENED)
    env = {"HEADSTART_TEMPLATES": json.dumps({"toy": str(template)})}
    with running_server(directory / "cache", "--model", "toy=toy:", env=env) as server:
        yield server


def test_a_chats_formed_answer_is_its_content(thinker: RunningServer) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    body = thinker.post("/v1/chat/completions", model="toy", messages=[USER], response_format=form).json()
    message: Json = body["choices"][0]["message"]
    assert (message["content"], message.get("reasoning_content")) == ('"far"', None)


def test_a_responses_formed_answer_is_its_message(thinker: RunningServer) -> None:
    form = {"type": "json_schema", "name": "answer", "schema": SCHEMA}
    body = thinker.post("/v1/responses", model="toy", input="How far?", text={"format": form}).json()
    assert [item["content"][0]["text"] for item in body["output"]] == ['"far"']


def test_a_messages_formed_answer_is_its_text(thinker: RunningServer) -> None:
    wanted = {"format": {"type": "json_schema", "schema": SCHEMA}}
    body = thinker.post(
        "/v1/messages", model="toy", max_tokens=64, messages=[USER], output_config=wanted
    ).json()
    assert body["content"] == [{"type": "text", "text": '"far"'}]
