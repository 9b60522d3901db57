"""docs/compatibility.md against the schemas, OpenAI's and Anthropic's clients and a running server.

An endpoint joins by a Section: its heading in the document, its body's class, what the official client may
send, and a request that is good but for one parameter."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from anthropic.types.message_create_params import MessageCreateParamsBase
from openai.types import completion_create_params
from openai.types.chat import ChatCompletionMessageParam
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.embedding_create_params import EmbeddingCreateParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from pydantic import BaseModel

import headstart
from headstart.api.anthropic.request import MessagesRequest
from headstart.api.completions.request import ChatRequest, CompletionRequest
from headstart.api.fields.generation import HARMLESS
from headstart.api.responses.request import REFUSED, ResponseRequest
from headstart.api.tokens.embeddings import EmbeddingRequest
from headstart.contents import ChatMessage
from servers import Json, RunningServer

DOCUMENT = (Path(headstart.__file__).parents[2] / "docs" / "compatibility.md").read_text()
USER = {"role": "user", "content": "How far does the light reach?"}
GREEDY: Json = {"model": "toy", "temperature": 0, "max_tokens": 8}


@dataclass(frozen=True)
class Section:
    """`request`: the body with one parameter. `also`: what else the class refuses by name. `content`: what
    an answer says."""

    heading: str
    path: str
    body: type[BaseModel]
    client: set[str]
    request: Callable[[Mapping[str, Any]], Json]
    also: frozenset[str] = frozenset()
    content: Callable[[Json], Any] = lambda answer: answer["choices"]

    @property
    def rows(self) -> list[Row]:
        _, _, rest = DOCUMENT.partition(f"\n## {self.heading}\n")
        assert rest, f"there is no section {self.heading!r}"
        lines = rest.partition("\n## ")[0].splitlines()
        return [Row.read(line) for line in lines if line.startswith("| `")]


@dataclass(frozen=True)
class Row:
    name: str
    status: str
    example: str
    error: str

    @classmethod
    def read(cls, line: str) -> Row:
        name, status, example, error, _ = (cell.strip() for cell in line.strip("|").split("|"))
        return cls(name.strip("`"), status, example.strip("`"), error)


SECTIONS = [
    Section(
        "POST /v1/chat/completions",
        "/v1/chat/completions",
        ChatRequest,
        set(chat_create_params.CompletionCreateParamsBase.__annotations__),
        lambda given: {**GREEDY, "messages": [USER], **given},
        frozenset(HARMLESS) - set(ChatRequest.model_fields),
    ),
    Section(
        "Messages",
        "/v1/chat/completions",
        ChatMessage,
        {name for kind in get_args(ChatCompletionMessageParam) for name in kind.__annotations__},
        lambda given: {**GREEDY, "messages": [USER, {"role": "assistant", "content": "So", **given}, USER]},
    ),
    Section(
        "POST /v1/completions",
        "/v1/completions",
        CompletionRequest,
        set(completion_create_params.CompletionCreateParamsBase.__annotations__),
        lambda given: {**GREEDY, "prompt": "The light", **given},
        frozenset(HARMLESS) - set(CompletionRequest.model_fields),
    ),
    Section(
        "POST /v1/embeddings",
        "/v1/embeddings",
        EmbeddingRequest,
        set(EmbeddingCreateParams.__annotations__),
        lambda given: {"model": "toy", "input": "The light", **given},
        content=lambda answer: answer["data"],
    ),
    Section(
        "POST /v1/responses",
        "/v1/responses",
        ResponseRequest,
        set(ResponseCreateParamsBase.__annotations__),
        lambda given: {
            **{"model": "toy", "temperature": 0, "max_output_tokens": 8},
            **{"input": USER["content"], "store": False},
            **given,
        },
        frozenset(REFUSED),
        lambda answer: [item["content"] for item in answer["output"]],
    ),
    Section(
        "POST /v1/messages",
        "/v1/messages",
        MessagesRequest,
        set(MessageCreateParamsBase.__annotations__),
        lambda given: {**GREEDY, "messages": [USER], **given},
        content=lambda answer: answer["content"],
    ),
]
ROWS = [
    pytest.param(section, row, id=f"{section.heading}-{row.name}")
    for section in SECTIONS
    for row in section.rows
]
sections = pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.heading)


@sections
def test_every_parameter_that_is_known_has_one_row(section: Section) -> None:
    named = [row.name for row in section.rows]
    assert len(named) == len(set(named))
    fields = {field.alias or name for name, field in section.body.model_fields.items()}
    assert fields | section.client | section.also <= set(named)


@sections
def test_what_is_supported_or_partly_so_is_in_the_schema(section: Section) -> None:
    fields = {field.alias or name for name, field in section.body.model_fields.items()}
    assert {row.name for row in section.rows if row.status == "supported"} <= fields


@sections
def test_every_field_says_what_it_is_for(section: Section) -> None:
    assert [name for name, field in section.body.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(("section", "row"), ROWS)
def test_a_row_is_as_it_says(toy: RunningServer, section: Section, row: Row) -> None:
    assert row.status in ("supported", "refused", "ignored")
    response = toy.post(section.path, **section.request({row.name: json.loads(row.example)}))
    if row.status == "ignored":
        plain = toy.post(section.path, **section.request({}))
        assert response.status_code == 200, response.text
        content = section.content(plain.json())
        assert content
        assert section.content(response.json()) == content
        return
    told = re.fullmatch(r"(\d+) `(\w+)`", row.error)
    assert told, row.error
    error = response.json()["error"]
    # Anthropic's have a type instead of a code, and say what they are about in their message alone.
    assert (response.status_code, error.get("code", error["type"])) == (int(told[1]), told[2])
    if "param" in error:
        assert row.name in str(error["param"]) or error["param"].startswith("messages")
    else:
        assert row.name in error["message"] or str(json.loads(row.example)) in error["message"]
