"""Prompts: templates, the cached part found by probes, and answers as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.errors import BadRequest, StartupError
from headstart.model_files import embedded_model
from headstart.prompt.detokenizer import AnswerDetokenizer
from headstart.prompt.prompts import Prompts
from headstart.prompt.template import ChatTemplate
from headstart.prompt.tokenizer import load_tokenizer
from headstart.tokens import common_prefix

SYSTEM = {"role": "system", "content": "You are the keeper of the lighthouse.\n\nAnswer in short."}
TEMPLATES = ["toy:template=chatml", "toy:template=fold", "toy:template=nosystem"]


def _prompts(path: str) -> Prompts:
    tokenizer = load_tokenizer(path)
    return Prompts(tokenizer, ChatTemplate(tokenizer.template, tokenizer.bos_text, tokenizer.eos_text))


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("path", [*TEMPLATES, pytest.param("", marks=pytest.mark.real_model)])
@pytest.mark.parametrize("question", ["Why?", "", "\n\nindented", "the end", " leading space", "Ünïcödé 🙂"])
def test_every_chat_with_the_cached_prompt_begins_with_its_opening(path: str, question: str) -> None:
    prompts = _prompts(path or embedded_model())
    opening = prompts.chat_opening([SYSTEM])
    tokens = prompts.chat([SYSTEM, _user(question)])
    assert len(opening) > 10
    # Whatever merges with the template's last character shortens what is shared by no more than a few tokens.
    assert common_prefix(opening, tokens) >= len(opening) - 2


@pytest.mark.parametrize("path", TEMPLATES)
def test_an_opening_covers_the_system_text_and_nothing_of_a_question(path: str) -> None:
    prompts = _prompts(path)
    text = b"".join(prompts.tokenizer.piece(token) for token in prompts.chat_opening([SYSTEM])).decode()
    assert SYSTEM["content"] in text
    assert "Why" not in text


def test_an_opening_is_the_same_however_a_question_begins() -> None:
    prompts = _prompts("toy:")
    assert prompts.chat_opening([SYSTEM]) == prompts.chat_opening([dict(SYSTEM)])


def test_a_system_message_is_folded_where_the_template_has_no_system_role() -> None:
    prompts = _prompts("toy:template=nosystem")
    with_system = prompts.chat([{"role": "system", "content": "Be brief."}, _user("Why?")])
    assert with_system == prompts.chat([_user("Be brief.\n\nWhy?")])


def test_what_a_template_refuses_is_told_in_its_own_words() -> None:
    prompts = _prompts("toy:template=nosystem")
    with pytest.raises(BadRequest, match="roles must alternate"):
        prompts.chat([_user("one"), _user("two")])


def test_a_template_can_not_reach_python() -> None:
    evil = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", "", "")
    with pytest.raises(BadRequest, match="unsafe"):
        evil.render([_user("x")])


def test_a_template_can_not_change_the_messages() -> None:
    with pytest.raises(BadRequest):
        ChatTemplate("{{ messages.append(1) }}", "", "").render([_user("x")])


def test_a_broken_template_is_reported_at_start() -> None:
    with pytest.raises(StartupError, match="not valid Jinja"):
        ChatTemplate("{% for x in %}", "", "")


def test_a_template_that_writes_a_leading_control_token_does_not_double_it() -> None:
    prompts = _prompts("toy:template=fold")
    tokens = prompts.chat([_user("hello")])
    assert tokens.count(tokens[0]) == 1


@pytest.mark.real_model
def test_the_real_tokenizer_gives_back_what_it_was_given() -> None:
    tokenizer = load_tokenizer(embedded_model())
    for text in ("Hello world", "Grüße 🙂\n\n\tdef f(x):\n        return x", "a\0b", "x" * 5000):
        assert b"".join(map(tokenizer.piece, tokenizer.encode(text))).decode() == text


@pytest.mark.real_model
def test_control_tokens_have_no_text() -> None:
    tokenizer = load_tokenizer(embedded_model())
    assert [tokenizer.piece(token) for token in tokenizer.encode("<|im_end|>")] == [b""]


def test_a_file_that_is_no_model_is_refused(tmp_path: object) -> None:
    with pytest.raises(StartupError, match="can't be read"):
        load_tokenizer(f"{tmp_path}/absent.gguf")


def _feed(data: bytes, stop: list[str]) -> tuple[str, bool]:
    answer = AnswerDetokenizer(lambda token: bytes([token]), stop)
    text = ""
    for byte in data:
        text += answer.add(byte)
        if answer.stopped:
            return text, True
    return text + answer.end(), answer.stopped


def test_characters_are_never_split() -> None:
    answer = AnswerDetokenizer(lambda token: bytes([token]))
    pieces = [answer.add(byte) for byte in "a🙂é".encode()]
    assert pieces == ["a", "", "", "", "🙂", "", "é"]


def test_a_character_that_never_ends_is_replaced() -> None:
    assert _feed("🙂".encode()[:3], []) == ("\ufffd", False)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["END"], "one "),
        (["ND t"], "one E"),
        (["x", "one"], ""),
        (["ENDLESS"], "one END two"),
        ([], "one END two"),
    ],
)
def test_a_stop_string_ends_the_text_before_it(stop: list[str], expected: str) -> None:
    assert _feed(b"one END two", stop) == (expected, expected != "one END two")


@given(st.text("abAB", max_size=30), st.lists(st.text("abAB", min_size=1, max_size=4), max_size=3))
def test_streamed_text_is_the_whole_text_up_to_the_first_stop(text: str, stop: list[str]) -> None:
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    # Streaming sees the stop string that is complete first.
    expected = text[: min(at for end, at in ends if end == min(ends)[0])] if ends else text
    assert _feed(text.encode(), stop) == (expected, bool(ends))


@given(st.text(max_size=40))
def test_any_text_survives_being_streamed_byte_by_byte(text: str) -> None:
    assert _feed(text.encode(), [])[0] == text
