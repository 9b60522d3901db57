"""Structured output from a model that computes, through OpenAI's client."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest
from openai import OpenAI
from pydantic import BaseModel

from servers import RunningServer, said

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(300)]


class Person(BaseModel):
    name: str
    age: int
    role: Literal["reader", "writer"]


ASKED: Any = [{"role": "user", "content": "Invent a person."}]


def test_the_openai_client_parses_a_pydantic_model(real: RunningServer) -> None:
    with OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as client:
        for temperature in (0, 1):
            answer = client.chat.completions.parse(
                model="smollm2",
                messages=ASKED,
                response_format=Person,
                temperature=temperature,
                seed=5,
                max_tokens=200,
            )
            parsed = answer.choices[0].message.parsed
            assert isinstance(parsed, Person)
            assert answer.choices[0].finish_reason == "stop"


def test_the_openai_client_streams_a_pydantic_model(real: RunningServer) -> None:
    with (
        OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as client,
        client.chat.completions.stream(
            model="smollm2", messages=ASKED, response_format=Person, temperature=0, max_tokens=200
        ) as stream,
    ):
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Person)


def test_a_small_model_ends_its_json(real: RunningServer) -> None:
    """Free to write white space, it would go on with it."""
    for seed in range(3):
        body = real.chat(
            "Tell me about a city, as JSON.",
            model="smollm2",
            response_format={"type": "json_object"},
            temperature=1,
            seed=seed,
            max_tokens=250,
        )
        text = said(body)
        assert not re.search(r"\s{27}", text)
        if body["choices"][0]["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)
        else:
            assert body["usage"]["completion_tokens"] == 250


def test_a_cache_does_not_change_the_answer(real: RunningServer) -> None:
    prompt = "You invent people for a novel that plays on an island. " * 8
    real.create("people", prompt, model="smollm2", **{"for": ["chat"]})
    asked: Any = {
        "model": "smollm2",
        "use_cache": "people",
        "response_format": {"type": "json_schema", "json_schema": {"schema": Person.model_json_schema()}},
        "max_tokens": 100,
    }
    hit = real.chat("Invent a person.", **asked)
    cold = real.chat("Invent a person.", cache_prompt=False, **asked)
    assert hit["usage"]["cache_hit"]
    assert said(hit) == said(cold)
    Person.model_validate_json(said(hit))


def test_answers_side_by_side_follow_each_its_own_form(real: RunningServer) -> None:
    forms: list[str | None] = ["[0-9]{20}", "[a-f]{4}( [a-f]{4}){5}", None, "(yes|no)"]

    def ask(form: str | None) -> str:
        wanted = {"type": "regex", "regex": form} if form else None
        return said(
            real.chat("Say something.", model="smollm2", response_format=wanted, temperature=1, max_tokens=60)
        )

    with ThreadPoolExecutor(4) as pool:
        for form, text in zip(forms, pool.map(ask, forms), strict=True):
            assert text
            assert form is None or re.fullmatch(form, text)


def test_an_answer_that_is_cut_says_so(real: RunningServer) -> None:
    body = real.chat(
        "Count.", model="smollm2", response_format={"type": "regex", "regex": "[a-z]{400}"}, max_tokens=12
    )
    assert body["choices"][0]["finish_reason"] == "length"
    assert re.fullmatch("[a-z]+", said(body))
