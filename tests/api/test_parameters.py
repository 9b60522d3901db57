"""OpenAI's parameters of chat and text completions, most of them through OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import exp
from typing import Any

import openai
import pytest
from openai import OpenAI

from conftest import StartServer
from headstart.errors import BadRequest
from headstart.prompt.answer_parts import PlainText
from headstart.prompt.detokenizer import AnswerDetokenizer
from headstart.prompt.prompts import Prompts
from headstart.prompt.template import CHATML, FOLD_SYSTEM, ChatTemplate
from headstart.prompt.toy_tokenizer import ToyTokenizer
from headstart.prompt.vocabulary import Vocabulary
from headstart.protocol import Token
from headstart.service.generation.answering import Answering
from headstart.service.interface.answer import Choice
from headstart.toyspec import BOS, END, EOS
from servers import Json, RunningServer, events, running_server, said

SYSTEM = "You are the keeper of a lighthouse and answer in one short sentence. "
USER: Any = {"role": "user", "content": "How far does the light reach?"}
GREEDY: Any = {"temperature": 0, "max_tokens": 24}
SEEDED: Any = {"temperature": 1, "seed": 7, "max_tokens": 24}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CACHED = "parameters"


@pytest.fixture
def client(toy: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{toy.url}/v1", api_key="none", max_retries=0) as connected:
        yield connected


def chat(server: RunningServer, **fields: Any) -> Json:
    """The body of an answered chat."""
    return _sent(server, CHAT, {"messages": [USER], **fields})


def text(server: RunningServer, prompt: Any = "The light", **fields: Any) -> Json:
    return _sent(server, TEXT, {"prompt": prompt, **fields})


def _sent(server: RunningServer, path: str, fields: Json) -> Json:
    response = server.post(path, **{"model": "toy", **GREEDY, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def streamed(server: RunningServer, path: str, fields: Json) -> Json:
    """The same body, put together from the chunks of a stream."""
    body = {"model": "toy", **GREEDY, **fields, "stream": True, "stream_options": {"include_usage": True}}
    choices: dict[int, Json] = {}
    with server.http.stream("POST", path, json=body) as response:
        *chunks, last = events(response)
    for chunk in chunks:
        (told,) = chunk["choices"]
        choice = choices.setdefault(told["index"], {"text": "", "logprobs": [], "finish_reason": None})
        assert choice["finish_reason"] is None, "a choice goes on after its end"
        choice["text"] += told["text"] if "text" in told else told["delta"].get("content", "")
        choice["logprobs"] += [told["logprobs"]] if told["logprobs"] else []
        choice["finish_reason"] = told["finish_reason"]
    assert sorted(choices) == list(range(len(choices)))
    return {"choices": [choices[i] for i in range(len(choices))], "usage": last["usage"]}


def texts(answer: Json) -> list[str]:
    return [each["message"]["content"] if "message" in each else each["text"] for each in answer["choices"]]


def refusal(server: RunningServer, path: str, fields: Json) -> Json:
    given = {"prompt": "Why?"} if path == TEXT else {"messages": [USER]}
    response = server.post(path, **{"model": "toy", **GREEDY, **given, **fields})
    assert response.status_code == 400, response.text
    error: Json = response.json()["error"]
    return error


# Several answers


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_are_those_of_n_seeds_one_after_another(
    toy: RunningServer, path: str, stream: bool
) -> None:
    given = {"messages": [USER]} if path == CHAT else {"prompt": "The light"}
    fields: Json = {**given, **SEEDED}
    alone = [said(_sent(toy, path, fields | {"seed": 7 + i})) for i in range(3)]
    if stream:
        together = [each["text"] for each in streamed(toy, path, fields | {"n": 3})["choices"]]
    else:
        together = texts(_sent(toy, path, fields | {"n": 3}))
    assert together == alone
    assert len(set(alone)) == 3


def test_n_answers_have_one_prompt_and_all_their_tokens_in_the_usage(client: OpenAI) -> None:
    request: Any = {"model": "toy", "messages": [USER], **GREEDY}
    one: Any = client.chat.completions.create(**request)
    two: Any = client.chat.completions.create(**request, n=2)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.usage.prompt_tokens == one.usage.prompt_tokens
    assert two.usage.completion_tokens == 2 * one.usage.completion_tokens


def test_a_streamed_usage_of_n_answers_is_the_whole_ones(toy: RunningServer) -> None:
    fields: Json = {"messages": [USER], "n": 2, "cache_prompt": False}
    assert streamed(toy, CHAT, fields)["usage"] == chat(toy, **fields)["usage"]


def test_n_answers_from_a_cache_are_those_without_it(toy: RunningServer) -> None:
    toy.create(CACHED, SYSTEM)
    system = {"role": "system", "content": SYSTEM}
    named = chat(toy, use_cache=CACHED, n=3, **SEEDED)
    plain = chat(toy, messages=[system, USER], n=3, cache_prompt=False, **SEEDED)
    assert named["usage"]["cache_hit"] is True
    assert plain["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert texts(named) == texts(plain)


def test_more_answers_than_slots_are_refused_with_a_way_out(toy: RunningServer) -> None:
    error = refusal(toy, CHAT, {"n": 5})
    assert error["param"] == "n"
    assert "--slots" in error["message"]


@pytest.mark.parametrize("fields", [{"best_of": 1}, {"best_of": 2, "n": 2}, {"best_of": None, "n": 2}])
def test_a_best_of_that_chooses_nothing_is_accepted(toy: RunningServer, fields: Json) -> None:
    assert len(text(toy, **fields)["choices"]) == fields.get("n", 1)


@pytest.mark.parametrize("fields", [{"best_of": 2}, {"best_of": 3, "n": 2}])
def test_a_best_of_that_would_choose_is_refused(toy: RunningServer, fields: Json) -> None:
    assert refusal(toy, TEXT, fields)["param"] == "best_of"


# Probabilities


def test_logprobs_of_a_chat_are_one_a_token_with_the_likeliest_in_order(client: OpenAI) -> None:
    request: Any = {"model": "toy", "messages": [USER], "logprobs": True, "top_logprobs": 3, **GREEDY}
    answer: Any = client.chat.completions.create(**request)
    (choice,) = answer.choices
    told = choice.logprobs.content
    assert len(told) == answer.usage.completion_tokens
    assert b"".join(bytes(each.bytes) for each in told).decode() == choice.message.content
    for each in told:
        values = [top.logprob for top in each.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert sum(map(exp, values)) <= 1 + 1e-6
        assert each.logprob <= values[0] <= 0


def test_logprobs_without_top_logprobs_tell_the_token_alone(toy: RunningServer) -> None:
    for fields in ({}, {"top_logprobs": 0}, {"top_logprobs": None}):
        (choice,) = chat(toy, logprobs=True, **fields)["choices"]
        assert choice["logprobs"]["content"]
        assert all(each["top_logprobs"] == [] for each in choice["logprobs"]["content"])


@pytest.mark.parametrize("fields", [{}, {"logprobs": False}, {"logprobs": None}])
def test_logprobs_that_were_not_asked_for_are_null(toy: RunningServer, fields: Json) -> None:
    assert chat(toy, **fields)["choices"][0]["logprobs"] is None
    assert text(toy, **fields)["choices"][0]["logprobs"] is None


def test_legacy_logprobs_have_tokens_values_and_offsets_into_the_text(client: OpenAI) -> None:
    answer: Any = client.completions.create(model="toy", prompt="The light", logprobs=2, **GREEDY)
    (choice,) = answer.choices
    told = choice.logprobs
    assert told
    assert told.tokens
    assert told.token_logprobs
    assert told.text_offset
    assert told.top_logprobs
    assert "".join(told.tokens) == choice.text
    for token, value, offset, top in zip(
        told.tokens, told.token_logprobs, told.text_offset, told.top_logprobs, strict=True
    ):
        assert choice.text[offset:].startswith(token)
        assert top[token] == value
        assert len(top) in (2, 3)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 2, "n": 2, **SEEDED}),
        (TEXT, {"prompt": "The light", "logprobs": 2, "n": 2, **SEEDED}),
        (CHAT, {"messages": [USER], "logprobs": True, "stop": ["e"]}),
        (TEXT, {"prompt": ["The light", "The sea"], "logprobs": 0}),
    ],
)
def test_streamed_logprobs_are_those_of_the_whole_answer(toy: RunningServer, path: str, fields: Json) -> None:
    whole, pieces = _sent(toy, path, fields), streamed(toy, path, fields)
    assert [each["text"] for each in pieces["choices"]] == texts(whole)
    for one, other in zip(whole["choices"], pieces["choices"], strict=True):
        assert other["finish_reason"] == one["finish_reason"]
        for name, values in one["logprobs"].items():
            if name != "refusal":
                assert [value for each in other["logprobs"] for value in each[name]] == values


def test_logprobs_from_a_cache_are_those_without_it(toy: RunningServer) -> None:
    toy.create(CACHED, SYSTEM)
    named = text(toy, use_cache=CACHED, logprobs=3)
    plain = text(toy, SYSTEM + "The light", logprobs=3, cache_prompt=False)
    assert named["usage"]["cache_hit"] is True
    assert named["choices"][0]["text"] == plain["choices"][0]["text"]
    one, other = (each["choices"][0]["logprobs"]["token_logprobs"] for each in (named, plain))
    assert one == pytest.approx(other, abs=1e-3)


def test_the_likeliest_of_a_chat_need_logprobs(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="toy", messages=[USER], top_logprobs=2)
    assert caught.value.param == "top_logprobs"


# What is chosen


def test_a_banned_token_never_comes_and_a_wished_one_always(toy: RunningServer) -> None:
    plain = text(toy, max_tokens=8)["choices"][0]["text"]
    banned = str(ord(plain[0]))
    assert plain[0] not in text(toy, logit_bias={banned: -100})["choices"][0]["text"]
    wished = text(toy, logit_bias={str(ord("z")): 100}, max_tokens=8)["choices"][0]["text"]
    assert wished == "z" * 8


def test_a_bias_for_an_unknown_token_is_refused_with_how_many_there_are(toy: RunningServer) -> None:
    error = refusal(toy, CHAT, {"logit_bias": {"100000": 1}})
    assert error["param"] == "logit_bias"
    assert "0 to 272" in error["message"]
    assert refusal(toy, CHAT, {"logit_bias": {"five": 1}})["param"] == "logit_bias.five"


def test_an_answer_that_may_not_end_goes_on_to_its_most_tokens(toy: RunningServer) -> None:
    ended = next(
        prompt
        for prompt in map("The light {}".format, range(100))
        if text(toy, prompt, max_tokens=60)["choices"][0]["finish_reason"] == "stop"
    )
    answer = text(toy, ended, max_tokens=60, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 60
    assert answer["choices"][0]["finish_reason"] == "length"


def test_an_end_may_be_banned_by_its_token_as_well(toy: RunningServer) -> None:
    answer = text(toy, max_tokens=200, logit_bias={str(EOS): -100})
    assert answer["choices"][0]["finish_reason"] == "length"


def test_the_same_seed_gives_the_same_answer_and_another_one_another(client: OpenAI) -> None:
    def answer(**fields: Any) -> str:
        options: Any = {"model": "toy", "messages": [USER], **SEEDED, **fields}
        return str(client.chat.completions.create(**options).choices[0].message.content)

    assert answer() == answer()
    assert answer(seed=8) != answer()
    assert len({answer(seed=None) for _ in range(3)}) > 1


@pytest.mark.parametrize("seed", [(1 << 63) - 1, -(1 << 63), 0])
def test_any_seed_will_do_for_several_answers(toy: RunningServer, seed: int) -> None:
    assert len(set(texts(chat(toy, **SEEDED | {"seed": seed}, n=3)))) == 3


def test_an_answer_without_a_most_goes_to_the_end_of_the_context(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:eos=0,ctx=256")
    usage = chat(server, max_tokens=None)["usage"]
    assert usage["total_tokens"] == 256
    usage = text(server, max_tokens=100_000)["usage"]
    assert usage["total_tokens"] == 256


def test_the_newer_name_of_the_most_tokens_counts(client: OpenAI) -> None:
    options: Any = {"model": "toy", "messages": [USER], "temperature": 0}
    answer: Any = client.chat.completions.create(max_tokens=9, max_completion_tokens=5, **options)
    assert answer.usage
    assert answer.usage.completion_tokens == 5


# Texts that end an answer


def _answered(pieces: list[bytes], stop: list[str]) -> Choice:
    """The answer whose tokens are these bytes."""
    tokenizer = ToyTokenizer("toy:")
    tokenizer.pieces |= {1000 + i: piece for i, piece in enumerate(pieces)}
    vocabulary = Vocabulary(Prompts(ToyTokenizer("toy:"), ChatTemplate(None, "", "")).facts())
    answer = Answering(
        0, vocabulary, AnswerDetokenizer(lambda token: tokenizer.pieces[token], stop), PlainText()
    )
    choice = Choice(0)
    for i in range(len(pieces)):
        if not answer.stopped:
            for delta in answer.add(Token(0, 1000 + i)):
                choice.add(delta)
    for event in answer.end("cancelled" if answer.stopped else "stop"):
        choice.add(event)
    return choice


SHORE = "a shore — far off. And then?".encode()


@pytest.mark.parametrize("size", [1, 2, 3, 5, len(SHORE)])
@pytest.mark.parametrize(
    ("stop", "left"),
    [
        ("— far", "a shore "),
        ("—", "a shore "),
        (".", "a shore — far off"),
        ("off. And", "a shore — far "),
        ("a", ""),
        ("nowhere", SHORE.decode()),
        ("then?!", SHORE.decode()),
    ],
)
def test_a_stop_text_ends_an_answer_wherever_its_tokens_are_cut(size: int, stop: str, left: str) -> None:
    pieces = [SHORE[at : at + size] for at in range(0, len(SHORE), size)]
    choice = _answered(pieces, [stop])
    assert choice.text == left
    assert choice.stop == (None if left == SHORE.decode() else stop)


@pytest.mark.parametrize(("start", "end"), [(5, 6), (7, 10), (20, 40)])
@pytest.mark.parametrize("listed", [False, True])
def test_a_stop_text_is_no_part_of_the_answer_streamed_or_whole(
    toy: RunningServer, start: int, end: int, listed: bool
) -> None:
    fields: Json = {"prompt": "The light", "max_tokens": 60, "ignore_eos": True}
    plain = said(_sent(toy, TEXT, fields))
    stop = plain[start:end]
    whole = _sent(toy, TEXT, fields | {"stop": ["never said", stop] if listed else stop})
    assert said(whole) == plain[: plain.index(stop)]
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert streamed(toy, TEXT, fields | {"stop": stop})["choices"][0]["text"] == said(whole)


# Prompts of completions


@pytest.mark.parametrize("stream", [False, True])
def test_each_prompt_of_a_list_gets_its_choices_in_order(toy: RunningServer, stream: bool) -> None:
    prompts = ["The light", "The sea", "A ship"]
    fields: Json = {"n": 2, **SEEDED}
    alone = [said for prompt in prompts for said in texts(text(toy, prompt, **fields))]
    if stream:
        choices = streamed(toy, TEXT, {"prompt": prompts, **fields})["choices"]
        assert [choice["text"] for choice in choices] == alone
    else:
        assert texts(text(toy, prompts, **fields)) == alone


def test_several_prompts_are_counted_together(toy: RunningServer) -> None:
    alone = [text(toy, prompt, cache_prompt=False)["usage"] for prompt in ("The light", "The sea")]
    usage = text(toy, ["The light", "The sea"], cache_prompt=False)["usage"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage[name] == sum(each[name] for each in alone)


def test_several_prompts_start_from_one_cache(toy: RunningServer) -> None:
    toy.create(CACHED, SYSTEM)
    answer = text(toy, ["The light", ""], use_cache=CACHED)
    assert answer["usage"]["cache_hit"] is True
    assert texts(answer) == texts(text(toy, [SYSTEM + "The light", SYSTEM]))


def test_more_prompts_than_slots_are_answered_all_the_same(toy: RunningServer) -> None:
    prompts = [f"Ship {i}" for i in range(12)]
    answer = text(toy, prompts, max_tokens=4)
    assert texts(answer) == [said(text(toy, prompt, max_tokens=4)) for prompt in prompts]


def test_token_ids_are_a_prompt_as_they_are(client: OpenAI) -> None:
    ids = [BOS, *b"A ship"]
    options: Any = {"model": "toy", **GREEDY}
    plain = client.completions.create(prompt="A ship", **options)
    for prompt in (ids, [ids]):
        answer: Any = client.completions.create(prompt=prompt, **options)
        assert answer.choices[0].text == plain.choices[0].text
    two = client.completions.create(prompt=[ids, [BOS, *b"A sea"]], **options)
    assert two.choices[0].text == plain.choices[0].text
    assert two.choices[1].text != plain.choices[0].text


def test_token_ids_continue_a_cache(toy: RunningServer) -> None:
    toy.create(CACHED, SYSTEM)
    named = text(toy, list(b"A ship"), use_cache=CACHED)
    assert named["usage"]["cache_hit"] is True
    assert texts(named) == texts(text(toy, SYSTEM + "A ship"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["The light", ["The light", "A ship"], [BOS, *b"A ship", END]])
def test_an_echo_begins_with_the_prompt_as_it_was_sent(toy: RunningServer, prompt: Any, stream: bool) -> None:
    toy.create(CACHED, SYSTEM)
    fields: Json = {"prompt": prompt, "use_cache": CACHED, "n": 2, **SEEDED}
    plain = texts(_sent(toy, TEXT, fields))
    match prompt:
        case str():
            sent = [prompt]
        case [str(), *_]:
            sent = prompt
        case _:
            sent = ["<s>A ship<|im_end|>"]
    expected = [sent[i // 2] + answer for i, answer in enumerate(plain)]
    if stream:
        choices = streamed(toy, TEXT, fields | {"echo": True})["choices"]
        assert [choice["text"] for choice in choices] == expected
    else:
        assert texts(_sent(toy, TEXT, fields | {"echo": True})) == expected


def test_an_echo_with_logprobs_is_refused(toy: RunningServer) -> None:
    error = refusal(toy, TEXT, {"echo": True, "logprobs": 0})
    assert error["param"] == "echo"


def test_a_stop_text_in_the_echo_ends_nothing(toy: RunningServer) -> None:
    answer = text(toy, "A ~ship", echo=True, stop=["~"])
    assert texts(answer)[0].startswith("A ~ship")
    assert answer["usage"]["completion_tokens"] > 0


@pytest.fixture(scope="module")
def gap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A model that knows the tokens of texts with a gap."""
    directory = tmp_path_factory.mktemp("gap") / "cache"
    with running_server(directory, "--model", "toy=toy:gap=1") as server:
        yield server


BEFORE, AFTER, BETWEEN = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"


def test_a_suffix_makes_a_gap_as_the_model_knows_it(gap: RunningServer) -> None:
    answer = text(gap, "def light():", suffix="return far")
    written = text(gap, f"{BEFORE}def light():{AFTER}return far{BETWEEN}")
    assert texts(answer) == texts(written)
    assert answer["usage"]["prompt_tokens"] == written["usage"]["prompt_tokens"]
    assert texts(text(gap, "", suffix="return far")) == texts(
        text(gap, f"{BEFORE}{AFTER}return far{BETWEEN}")
    )


def test_a_cached_text_is_a_part_of_what_is_before_the_gap(gap: RunningServer) -> None:
    plain = text(gap, SYSTEM + "def light():", suffix="return far")
    gap.create("code", SYSTEM)
    gap.create("code-with-a-gap", BEFORE + SYSTEM)
    for name, is_all_of_it in (("code", False), ("code-with-a-gap", True)):
        named = text(gap, "def light():", suffix="return far", use_cache=name, explain_cache=True)
        assert texts(named) == texts(plain)
        told = named["cache_explanation"]
        assert (told["matched_tokens"] == told["cache_tokens"]) is is_all_of_it


def test_a_suffix_goes_with_texts_and_with_models_that_know_gaps(
    toy: RunningServer, gap: RunningServer
) -> None:
    assert refusal(gap, TEXT, {"prompt": [65], "suffix": "far"})["param"] == "suffix"
    error = refusal(toy, TEXT, {"suffix": "far"})
    assert error["param"] == "suffix"
    assert "leave suffix out" in error["message"]


# Messages


def test_a_text_in_parts_is_the_text(client: OpenAI) -> None:
    parts: Any = [{"type": "text", "text": "How far does "}, {"type": "text", "text": "the light reach?"}]
    options: Any = {"model": "toy", **GREEDY}
    split: Any = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **options)
    whole: Any = client.chat.completions.create(messages=[USER], **options)
    assert split.choices[0].message.content == whole.choices[0].message.content
    assert split.usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_developer_is_the_system(toy: RunningServer) -> None:
    answers = [
        said(chat(toy, messages=[{"role": role, "content": SYSTEM}, USER]))
        for role in ("developer", "system")
    ]
    assert answers[0] == answers[1]


def test_a_name_goes_to_a_template_that_writes_it(start_server: StartServer, tmp_path: Any) -> None:
    template = tmp_path / "named.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] }}{{ '(' + m['name'] + ')' if m['name'] else '' }}: "
        "{{ m['content'] }}\n{% endfor %}assistant:"
    )
    templates = json.dumps({"toy": str(template)})
    server = start_server("--model", "toy=toy:", env={"HEADSTART_TEMPLATES": templates})
    named = chat(server, messages=[USER | {"name": "Ann"}])
    assert texts(named) == texts(text(server, f"user(Ann): {USER['content']}\nassistant:"))
    assert texts(chat(server)) == texts(text(server, f"user: {USER['content']}\nassistant:"))


PREFILL = {"role": "assistant", "content": "It reaches "}


def test_a_last_message_of_the_assistant_is_continued(toy: RunningServer) -> None:
    answer = chat(toy, messages=[USER, PREFILL])
    raw = f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\nIt reaches "
    assert texts(answer) == texts(text(toy, raw))
    assert streamed(toy, CHAT, {"messages": [USER, PREFILL]})["choices"][0]["text"] == said(answer)


def test_a_continued_message_that_starts_from_a_cache_is_the_same(toy: RunningServer) -> None:
    toy.create(CACHED, SYSTEM)
    system = {"role": "system", "content": SYSTEM}
    named = chat(toy, messages=[USER, PREFILL], use_cache=CACHED)
    assert named["usage"]["cache_hit"] is True
    plain = chat(toy, messages=[system, USER, PREFILL], cache_prompt=False)
    assert texts(named) == texts(plain)


def test_a_continued_message_is_saved_with_its_answer_as_one(toy: RunningServer) -> None:
    answer = chat(toy, messages=[USER, PREFILL], save_as="continued")
    after = chat(toy, messages=[{"role": "user", "content": "And then?"}], use_cache="continued")
    whole = {"role": "assistant", "content": PREFILL["content"] + said(answer)}
    in_full = chat(toy, messages=[USER, whole, {"role": "user", "content": "And then?"}])
    assert texts(after) == texts(in_full)
    assert toy.http.get("/v1/cache/toy/continued").json()["messages"] == [USER, whole]


def test_what_says_that_it_continues_or_not_is_taken_at_its_word(toy: RunningServer) -> None:
    continued: Json = {"continue_final_message": True, "add_generation_prompt": False}
    plain = said(chat(toy, messages=[USER, PREFILL]))
    assert said(chat(toy, messages=[USER, PREFILL], **continued)) == plain
    answered: Json = {"continue_final_message": False, "add_generation_prompt": True}
    assert said(chat(toy, **answered)) == said(chat(toy))
    for name, value in continued.items():
        assert refusal(toy, CHAT, {name: value})["param"] == name
    error = refusal(toy, CHAT, {"messages": [USER, PREFILL], "continue_final_message": False})
    assert error["param"] == "continue_final_message"


def test_calls_of_tools_are_no_message_to_continue() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    assert ChatTemplate(CHATML, "", "").render([USER, call]).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "content", ["It reaches ", "", " far", "<think>\nfar</think>\n", "continued-from-here"]
)
@pytest.mark.parametrize("source", [CHATML, FOLD_SYSTEM])
def test_what_is_continued_ends_the_prompt_as_it_was_sent(source: str, content: str) -> None:
    prompt = ChatTemplate(source, "<s>", "</s>").render([USER, {"role": "assistant", "content": content}])
    assert prompt.endswith(f"<|im_start|>assistant\n{content}")


def test_a_template_without_the_assistants_words_can_not_continue_them() -> None:
    template = ChatTemplate(
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", "", ""
    )
    with pytest.raises(BadRequest) as caught:
        template.render([USER, PREFILL])
    assert caught.value.param == "messages"
    assert "user" in caught.value.message


# With a model that computes


@pytest.mark.real_model
def test_the_real_models_logprobs_are_the_same_from_a_cache_and_without(real: RunningServer) -> None:
    real.create(CACHED, SYSTEM * 8, model="smollm2")
    system = {"role": "system", "content": SYSTEM * 8}
    fields: Json = {"model": "smollm2", "logprobs": True, "top_logprobs": 4, "n": 2}
    named = chat(real, use_cache=CACHED, **fields)
    plain = chat(real, messages=[system, USER], cache_prompt=False, **fields)
    assert named["usage"]["cache_hit"] is True
    assert plain["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert texts(named) == texts(plain)
    for one, other in zip(named["choices"], plain["choices"], strict=True):
        values = [[each["logprob"] for each in choice["logprobs"]["content"]] for choice in (one, other)]
        assert values[0] == pytest.approx(values[1], abs=1e-3)
        for each in one["logprobs"]["content"]:
            # Greedy: the chosen one is the likeliest.
            assert each["logprob"] == pytest.approx(each["top_logprobs"][0]["logprob"], abs=1e-6)


@pytest.mark.real_model
def test_the_real_model_continues_a_message_and_several_prompts(real: RunningServer) -> None:
    answer = chat(
        real,
        model="smollm2",
        messages=[
            {"role": "user", "content": "Name the capital of France."},
            {"role": "assistant", "content": "The capital of France is"},
        ],
        max_tokens=3,
    )
    assert "Paris" in said(answer)
    prompts = ["The capital of France is", "One, two, three,"]
    alone = [said(text(real, prompt, model="smollm2")) for prompt in prompts]
    assert texts(text(real, prompts, model="smollm2")) == alone
