"""Reasoning in chats: told apart from the answer, and what a template is told about it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from servers import Json, RunningServer, events, running_server

# As Qwen 3 does: the prompt opens the reasoning, or closes it where there is to be none; that of earlier
# turns is written where a message has it.
THINKING = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['reasoning_content'] %}
{{- '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' }}{% endif %}
{{- message['content'] + '<|im_end|>\\n' }}{% endfor %}{{ '<|im_start|>assistant\\n<think>\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '\\n</think>\\n\\n' }}{% endif %}"""
QUESTION = {"role": "user", "content": "How far does the light reach?"}
SYSTEM = "You are the keeper of a lighthouse and answer in one short sentence. " * 3
WITHOUT = {"enable_thinking": False}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The toy model never closes its reasoning."""
    directory = tmp_path_factory.mktemp("thinker")
    template = directory / "thinking.jinja"
    template.write_text(THINKING)
    env = {"HEADSTART_TEMPLATES": json.dumps({"toy": str(template)})}
    with running_server(directory / "cache", "--model", "toy=toy:eos=0", env=env) as server:
        yield server


def _ask(server: RunningServer, *messages: Json, **more: Any) -> Json:
    body = {"model": "toy", "temperature": 0, "max_tokens": 24, **more}
    response = server.post("/v1/chat/completions", messages=list(messages) or [QUESTION], **body)
    assert response.status_code == 200, response.text
    return response.json()


def _message(answer: Json) -> Json:
    message: Json = answer["choices"][0]["message"]
    return message


def test_what_follows_a_think_tag_at_the_prompts_end_is_reasoning(thinker: RunningServer) -> None:
    told = _message(_ask(thinker))
    plain = _message(_ask(thinker, reasoning_format="none"))
    assert told["content"] == ""
    assert told["reasoning_content"] == plain["content"].lstrip()
    assert "reasoning_content" not in plain


@pytest.mark.parametrize("reasoning_format", ["auto", "deepseek", None])
def test_a_streams_reasoning_is_that_of_the_whole_answer(
    thinker: RunningServer, reasoning_format: str | None
) -> None:
    whole = _message(_ask(thinker, reasoning_format=reasoning_format))
    body = {"model": "toy", "temperature": 0, "max_tokens": 24, "messages": [QUESTION], "stream": True}
    with thinker.http.stream("POST", "/v1/chat/completions", json=body) as response:
        deltas = [event["choices"][0]["delta"] for event in events(response)]
    said = [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta]
    assert "".join(said) == whole["reasoning_content"]
    assert len(said) > 5
    assert not any(delta.get("content") for delta in deltas)


def test_a_template_is_told_not_to_think(thinker: RunningServer) -> None:
    told = _message(_ask(thinker, chat_template_kwargs=WITHOUT))
    assert told["content"]
    assert "reasoning_content" not in told
    assert _ask(thinker, chat_template_kwargs={"enable_thinking": True}) != _ask(
        thinker, chat_template_kwargs=WITHOUT
    )


@pytest.mark.parametrize("variables", [{}, WITHOUT])
def test_an_answer_is_the_same_from_a_cache_whatever_the_template_is_told(
    thinker: RunningServer, variables: Json
) -> None:
    thinker.create("keeper", SYSTEM)
    system = {"role": "system", "content": SYSTEM}
    warm = _ask(thinker, use_cache="keeper", chat_template_kwargs=variables)
    cold = _ask(thinker, system, QUESTION, chat_template_kwargs=variables, cache_prompt=False)
    assert warm["usage"]["cache_hit"] is True
    assert warm["timings"]["prompt_n"] < 60
    assert _message(warm) == _message(cold)


def test_the_reasoning_of_earlier_turns_is_for_the_template(thinker: RunningServer) -> None:
    def tokens(**more: str) -> int:
        turn = {"role": "assistant", "content": "Far.", **more}
        return int(_ask(thinker, QUESTION, turn, QUESTION)["usage"]["prompt_tokens"])

    assert tokens(reasoning_content="It is a strong light.") > tokens() + 30


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reasoning_format", "loud"),
        ("chat_template_kwargs", {"messages": 1}),
        ("chat_template_kwargs", {"add_generation_prompt": False}),
        ("chat_template_kwargs", {"bos_token": "x"}),
        ("chat_template_kwargs", {"a": {"b": 1}}),
        ("chat_template_kwargs", "enable_thinking"),
        ("chat_template_kwargs", {"a": "\ud800"}),
        ("chat_template_kwargs", {"\ud800": 1}),
    ],
)
def test_what_a_template_is_not_to_be_told_is_refused(
    thinker: RunningServer, field: str, value: object
) -> None:
    body = json.dumps({"model": "toy", "max_tokens": 1, "messages": [QUESTION], field: value})
    response = thinker.http.post("/v1/chat/completions", content=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, field), response.text


@pytest.mark.parametrize("value", [10**400, 1.5, None, True, "{{ 7 * 7 }}"])
def test_a_template_is_told_any_plain_value(thinker: RunningServer, value: object) -> None:
    assert _ask(thinker, chat_template_kwargs={"self": value, "loop": value, "enable_thinking": value})


@pytest.mark.slow
def test_openais_client_reads_reasoning(thinker: RunningServer) -> None:
    with OpenAI(base_url=f"{thinker.url}/v1", api_key="none", max_retries=0) as client:
        messages: Any = [QUESTION]
        answer = client.chat.completions.create(
            model="toy", messages=messages, max_tokens=8, temperature=0, logprobs=False
        )
    assert (answer.choices[0].message.model_extra or {})["reasoning_content"]
