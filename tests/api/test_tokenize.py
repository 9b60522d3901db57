"""Texts to tokens and back, and messages to prompts, as llama-server's clients ask for it."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import StartServer
from headstart.toyspec import N_VOCAB
from servers import Json, RunningServer

TEXT = "The thing, by definition: Æsop — 漁港 🐟\n\n  indented"


def ask(server: RunningServer, path: str, **body: Any) -> Json:
    response = server.post(path, **body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_text_comes_back_from_its_tokens(toy: RunningServer) -> None:
    answer = ask(toy, "/tokenize", model="toy", content=TEXT)
    assert answer["n"] == len(answer["tokens"]) > 10
    assert ask(toy, "/detokenize", model="toy", tokens=answer["tokens"]) == {"content": TEXT}


def test_content_and_prompt_are_two_names_of_one_thing(toy: RunningServer) -> None:
    assert ask(toy, "/tokenize", content=TEXT) == ask(toy, "/tokenize", prompt=TEXT)


def test_special_tokens_are_added_when_asked_for(toy: RunningServer) -> None:
    plain = ask(toy, "/tokenize", content="hi")["tokens"]
    special = ask(toy, "/tokenize", content="hi", add_special=True)["tokens"]
    assert len(special) == len(plain) + 1
    assert ask(toy, "/detokenize", tokens=special)["content"] == "<s>hi"


def test_control_tokens_are_text_when_asked_for(toy: RunningServer) -> None:
    assert ask(toy, "/tokenize", content="<|im_end|>")["n"] == 1
    as_text = ask(toy, "/tokenize", content="<|im_end|>", parse_special=False)
    assert as_text["n"] > 1
    assert ask(toy, "/detokenize", tokens=as_text["tokens"])["content"] == "<|im_end|>"


def test_pieces_are_text_or_where_they_are_none_bytes(toy: RunningServer) -> None:
    answer = ask(toy, "/tokenize", content="theé", with_pieces=True)
    pieces = [item["piece"] for item in answer["tokens"]]
    assert pieces == ["the", [0xC3], [0xA9]]
    assert [item["id"] for item in answer["tokens"]] == ask(toy, "/tokenize", content="theé")["tokens"]


def test_a_template_makes_the_prompt_that_a_chat_has(toy: RunningServer) -> None:
    messages = [{"role": "user", "content": "Hi."}]
    prompt = ask(toy, "/apply-template", model="toy", messages=messages)["prompt"]
    assert prompt == "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
    n_tokens = ask(toy, "/tokenize", content=prompt, add_special=True)["n"]
    assert toy.chat("Hi.")["usage"]["prompt_tokens"] == n_tokens


def test_tools_are_written_by_the_template_or_as_text(toy: RunningServer, start_server: StartServer) -> None:
    body: Json = {"messages": [{"role": "user", "content": "Hi."}]}
    body["tools"] = [{"type": "function", "function": {"name": "count_ropes"}}]
    assert '"count_ropes"' in ask(toy, "/apply-template", **body)["prompt"]
    server = start_server("--model", "toy=toy:template=tools")
    assert '"count_ropes"' in ask(server, "/apply-template", **body)["prompt"]


def test_the_model_must_be_named_where_there_are_several(start_server: StartServer) -> None:
    server = start_server("--model", "one=toy:", "--model", "two=toy:template=fold")
    bodies: dict[str, Json] = {
        "/tokenize": {"content": "x"},
        "/detokenize": {"tokens": [120]},
        "/apply-template": {"messages": [{"role": "user", "content": "x"}]},
    }
    for path, body in bodies.items():
        response = server.post(path, **body)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "model")
        assert "one, two" in error["message"]
        # The second one is loaded for it.
        ask(server, path, model="two", **body)


def test_nothing_gives_nothing(toy: RunningServer) -> None:
    assert ask(toy, "/tokenize", content="") == {"tokens": [], "n": 0}
    assert ask(toy, "/detokenize", tokens=[]) == {"content": ""}


def test_a_long_text_is_tokenised_and_comes_back(toy: RunningServer) -> None:
    long = "The tide comes in. " * 2000
    tokens = ask(toy, "/tokenize", content=long)["tokens"]
    assert ask(toy, "/detokenize", tokens=tokens)["content"] == long


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": "x", "prompt": "y"}, "content"),
        ("/tokenize", {"content": ["x"]}, "content"),
        ("/tokenize", {"content": 5}, "content"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [N_VOCAB]}, "tokens"),
        ("/detokenize", {"tokens": [10**40]}, "tokens"),
        ("/detokenize", {"tokens": ["x"] * 1000}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/apply-template", {"messages": []}, "messages"),
        ("/apply-template", {"messages": [{"role": "user"}]}, "messages"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_field(
    toy: RunningServer, path: str, body: Json, param: str
) -> None:
    response = toy.post(path, model="toy", **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")


def test_half_a_surrogate_pair_is_refused(toy: RunningServer) -> None:
    response = toy.http.post("/tokenize", content=rb'{"content": "\ud800"}')
    assert response.status_code == 400


def test_an_unknown_model_is_404(toy: RunningServer) -> None:
    response = toy.post("/tokenize", model="nobody", content="x")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.real_model
def test_the_real_model_counts_as_its_usage_does(real: RunningServer) -> None:
    tokens = ask(real, "/tokenize", content=TEXT)["tokens"]
    assert ask(real, "/detokenize", tokens=tokens)["content"] == TEXT
    prompt = ask(real, "/apply-template", messages=[{"role": "user", "content": TEXT}])["prompt"]
    n_tokens = ask(real, "/tokenize", content=prompt, add_special=True)["n"]
    answer = real.chat(TEXT, model="smollm2", max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == n_tokens
