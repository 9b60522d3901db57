"""Answers with calls and reasoning, read piece by piece: wherever they were cut, they say the same."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from random import Random
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from headstart.engine.grammar_check import END, Bytes
from headstart.engine.matcher import Matcher
from headstart.prompt import reasoning
from headstart.prompt.answer_parts import AnswerPart, Parser, PlainText
from headstart.prompt.reasoning import ReasoningParser
from headstart.prompt.tool_calls.formats import (
    CALL_FORMATS,
    GEMMA,
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_NAMED,
    CallFormat,
    call_format_of,
)
from headstart.prompt.tool_calls.grammar import Function, quoted, schema_of

NAMES = {"look", "listen", "look_up"}
ARGUMENTS = '{"where": "up {\\" }] there", "n": [1, {"a": null}]}'
LOOK = json.loads(ARGUMENTS)
Said = tuple[str, str, list[tuple[str, Any]]]


def _read(parser: Parser, pieces: Sequence[str]) -> list[AnswerPart]:
    return [part for piece in pieces for part in parser.add(piece)] + parser.end()


def _sum(parts: list[AnswerPart]) -> Said:
    """Text, reasoning, and calls with their arguments; each call's deltas are in order."""
    text = "".join(part.text for part in parts)
    reasoning = "".join(part.reasoning for part in parts)
    calls: list[list[str]] = []
    for part in parts:
        assert sum(map(bool, (part.text, part.reasoning, part.call))) == 1
        if call := part.call:
            assert bool(call.id) == bool(call.name) == (call.index == len(calls))
            if call.id:
                calls.append([call.name, ""])
            assert call.index == len(calls) - 1
            calls[-1][1] += call.arguments
    return text, reasoning, [(name, arguments) for name, arguments in calls]


def _loaded(said: Said) -> Said:
    text, reasoning, calls = said
    return text, reasoning, [(name, json.loads(arguments)) for name, arguments in calls]


def _hermes(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


def _object(name: str, key: str = "arguments", arguments: str = ARGUMENTS) -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


PYTHON = "where='up {\" }] there', n=[1, {'a': None}]"
LISTEN: tuple[str, Any] = ("listen", {})
# Texts and what they say.
CALLS: list[tuple[CallFormat, str, str, list[tuple[str, Any]]]] = [
    (HERMES, _hermes(_object("look")), "", [("look", LOOK)]),
    (HERMES, f"<tool_call>{_object('look')}</tool_call>", "", [("look", LOOK)]),
    (HERMES, "I look.\n\n" + _hermes(_object("look")) + "\nDone. ", "I look.Done. ", [("look", LOOK)]),
    (
        HERMES,
        _hermes(_object("look")) + "\n" + _hermes(_object("listen", arguments="{}")),
        "",
        [("look", LOOK), LISTEN],
    ),
    (HERMES, _hermes(f'{{"arguments": {ARGUMENTS}, "name": "look"}}'), "", [("look", LOOK)]),
    (HERMES, _hermes('{"name": "listen"}'), "", [LISTEN]),
    (HERMES, _hermes('{"name": "listen", "arguments": {}, "id": "}"}'), "", [LISTEN]),
    (HERMES, _hermes('{"name": "listen", "arguments": "{}"}'), "", [LISTEN]),
    (HERMES, _hermes('{"function": {"name": "listen"}, "type": "function"}'), "", [LISTEN]),
    (HERMES, "<tool_call>" + _object("look") + "\n</tool", "", [("look", LOOK)]),
    (HERMES, "<tool_call>" + _object("look")[:-1], "", [("look", LOOK)]),
    (HERMES, "<tool_call>" + _object("look")[:-1] + "</tool_call>!", "!", [("look", LOOK)]),
    (HERMES, "1 < 2, a <tool and a <tool_box>", "1 < 2, a <tool and a <tool_box>", []),
    (LLAMA, _object("look", "parameters"), "", [("look", LOOK)]),
    (LLAMA, f'\n{{"type": "function", "name": "look", "parameters": {ARGUMENTS}}}\n', "", [("look", LOOK)]),
    (LLAMA, f'{{"type": "function", "function": "look", "parameters": {ARGUMENTS}}}', "", [("look", LOOK)]),
    (LLAMA, "<|python_tag|>" + _object("look", "parameters"), "", [("look", LOOK)]),
    (
        LLAMA,
        _object("look", "parameters") + "; " + _object("listen", "parameters", "{}"),
        "",
        [("look", LOOK), LISTEN],
    ),
    (MISTRAL, f"[TOOL_CALLS][{_object('look')}]", "", [("look", LOOK)]),
    (
        MISTRAL,
        f'Well. [TOOL_CALLS] [{_object("look")[:-1]}, "id": "12"}}, {_object("listen", arguments="{}")}]',
        "Well.",
        [("look", LOOK), LISTEN],
    ),
    (MISTRAL_NAMED, f"[TOOL_CALLS]look[ARGS]{ARGUMENTS}", "", [("look", LOOK)]),
    (MISTRAL_NAMED, f"[TOOL_CALLS]look{ARGUMENTS}[TOOL_CALLS]listen[ARGS]{{}}", "", [("look", LOOK), LISTEN]),
    (MISTRAL_NAMED, f"[TOOL_CALLS]look[CALL_ID]123456789[ARGS]{ARGUMENTS}", "", [("look", LOOK)]),
    (GEMMA, f"[look({PYTHON}), listen()]", "", [("look", LOOK), LISTEN]),
    (GEMMA, f"```tool_code\nlook({PYTHON})\nlisten()\n```", "", [("look", LOOK), LISTEN]),
    (GEMMA, f"So:\n```tool_code\n[look({PYTHON})]", "So:", [("look", LOOK)]),
    (GEMMA, f"```json\n{_object('look', 'parameters')}\n```\nThere.", "There.", [("look", LOOK)]),
    (GEMMA, _object("look", "parameters"), "", [("look", LOOK)]),
    (GEMMA, "[look_up(a=true, b=-1.5)]", "", [("look_up", {"a": True, "b": -1.5})]),
]

# Texts that look like calls and aren't.
NO_CALLS: list[tuple[CallFormat, str]] = [
    (HERMES, _hermes("look up")),
    (HERMES, _hermes("{look: up}")),
    (HERMES, _hermes('{"where": "up"}')),
    (HERMES, _hermes(_object("jump"))),
    (HERMES, _hermes('{"name": 5, "arguments": {}}')),
    (HERMES, _hermes('{"name": "look", "arguments": [1]}')),
    (HERMES, _hermes('{"name": "look", "arguments": "up"}')),
    (HERMES, _hermes('{"name": "lo\\qok", "arguments": {}}')),
    (HERMES, _hermes('{"name": "look", "arguments": ' + "[" * 100_000)),
    (HERMES, '<tool_call>\n{"name": "look", "argum'),
    (HERMES, "<tool_call>"),
    (HERMES, "Text. <tool_c"),
    (LLAMA, '{"temperature": 5, "name": "look"}'),
    (LLAMA, '{"name": "Paul", "age": 5}'),
    (LLAMA, "{}"),
    (LLAMA, "Text first: " + _object("look", "parameters")),
    (LLAMA, '<|python_tag|>brave_search.call(query="x")'),
    (MISTRAL, "[TOOL_CALLS]"),
    (MISTRAL, "[TOOL_CALLS] [1, 2]"),
    (MISTRAL, f"[TOOL_CALLS][{_object('jump')}]"),
    (MISTRAL_NAMED, f"[TOOL_CALLS]jump[ARGS]{ARGUMENTS}"),
    (MISTRAL_NAMED, "[TOOL_CALLS]look[ARGS]"),
    (GEMMA, "[1, 2, 3]"),
    (GEMMA, "[look(1)]"),
    (GEMMA, "[look(where=up)]"),
    (GEMMA, "[look(**{})]"),
    (GEMMA, "[look(), jump()]"),
    (GEMMA, "[look(where='\\q"),
    (GEMMA, "```tool_code\nimport os\nlook()\n```"),
    (GEMMA, "```tool_code\n" + "(" * 10_000 + "\n```"),
    (GEMMA, "```json\n[1]\n```"),
    (GEMMA, "```python\nlook()\n```"),
]


@pytest.mark.parametrize(("call_format", "text", "content", "calls"), CALLS)
def test_calls_are_read(
    call_format: CallFormat, text: str, content: str, calls: list[tuple[str, Any]]
) -> None:
    assert _loaded(_sum(_read(call_format.parser(NAMES, None), [text]))) == (content, "", calls)


@pytest.mark.parametrize(("call_format", "text"), NO_CALLS)
def test_what_is_no_call_is_text_to_the_last_character(call_format: CallFormat, text: str) -> None:
    assert _sum(_read(call_format.parser(NAMES, None), [text])) == (text, "", [])


TEXTS = [(call_format, text) for call_format, text, *_ in CALLS] + [
    each for each in NO_CALLS if len(each[1]) < 1000
]


@pytest.mark.parametrize(("call_format", "text"), TEXTS)
def test_a_text_says_the_same_wherever_it_is_cut(call_format: CallFormat, text: str) -> None:
    def said(pieces: Sequence[str]) -> Said:
        return _sum(_read(call_format.parser(NAMES, None), pieces))

    whole = said([text])
    assert said(list(text)) == whole
    for at in range(1, len(text)):
        assert said([text[:at], text[at:]]) == whole


# What confuses parsers, in any order.
SCRAPS = (
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"),
    *(
        "```tool_code",
        "```json",
        "```",
        "[",
        "]",
        "{",
        "}",
        '"',
        "'",
        ",",
        ";",
        ":",
        "(",
        ")",
        "\\",
        "\n",
        " ",
    ),
    *("look", "jump", '{"name": "look", "arguments": {', '{"name": "jump", "parameters": ', '{"a": 1}', "}}"),
    *('{"name": "listen", "arguments": {}}', "[look(a=1), listen()]", "listen()", "<think>", "</think>", "x"),
)


@pytest.mark.parametrize("call_format", CALL_FORMATS)
@given(scraps=st.lists(st.sampled_from(SCRAPS), max_size=12), data=st.data())
def test_any_text_says_the_same_wherever_it_is_cut(
    call_format: CallFormat, scraps: list[str], data: st.DataObject
) -> None:
    text = "".join(scraps)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    most = data.draw(st.sampled_from([None, 1]))

    def said(pieces: Sequence[str]) -> Said:
        return _sum(_read(ReasoningParser(call_format.parser(NAMES, most), inside=False), pieces))

    whole = said([text])
    assert said(list(text)) == whole
    assert said(pieces) == whole
    assert len(whole[2]) <= (most or len(text))


@pytest.mark.parametrize("call_format", CALL_FORMATS)
@given(scraps=st.lists(st.sampled_from(SCRAPS), max_size=12))
def test_a_text_without_calls_is_kept_whole(call_format: CallFormat, scraps: list[str]) -> None:
    text = "".join(scraps)
    content, _, calls = _sum(_read(call_format.parser(NAMES, None), [text]))
    assert calls or content == text


@pytest.mark.parametrize("call_format", [HERMES, LLAMA, MISTRAL])
def test_arguments_are_told_as_they_are_written(call_format: CallFormat) -> None:
    text = next(text for each, text, *_ in CALLS if each is call_format)
    parser = call_format.parser(NAMES, None)
    deltas = [[part.call for part in parser.add(character) if part.call] for character in text]
    first = next(i for i, told in enumerate(deltas) if told)
    assert text[: first + 1].endswith("{")
    assert [call.arguments for told in deltas[first + 1 : first + len(ARGUMENTS)] for call in told] == list(
        ARGUMENTS[1:]
    )


def test_text_is_told_as_soon_as_it_can_be_no_call() -> None:
    parser = HERMES.parser(NAMES, None)
    told = ["".join(part.text for part in parser.add(piece)) for piece in ("a", " <", "tool", "s", " b")]
    assert told == ["a", "", "", " <tools", " b"]
    answer = LLAMA.parser(NAMES, None)
    assert [answer.add(piece) for piece in ("{", '"temp', "er")] == [
        [],
        [AnswerPart(text='{"temp')],
        [AnswerPart(text="er")],
    ]


@pytest.mark.parametrize(("call_format", "text"), [(d, t) for d, t, _, calls in CALLS if len(calls) == 2])
def test_a_call_that_is_one_too_many_is_text(call_format: CallFormat, text: str) -> None:
    content, _, calls = _sum(_read(call_format.parser(NAMES, 1), [text]))
    assert len(calls) <= 1
    assert "listen" in content


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\nHm. \n</think>\n\nYes.", "Hm.", "Yes."),
        ("\n<think>Hm.</think>Yes. ", "Hm.", "Yes. "),
        ("<think>\n\n</think>\n\nYes.", "", "Yes."),
        ("<think>Hm. </thin", "Hm. </thin", ""),
        ("Yes <think>no</think>", "", "Yes <think>no</think>"),
        (" <thinker>", "", " <thinker>"),
        (" <thi", "", " <thi"),
        ("<think>a</think>b</think>", "a", "b</think>"),
    ],
)
def test_reasoning_is_what_an_answer_begins_with(text: str, reasoning: str, content: str) -> None:
    for pieces in ([text], list(text)):
        assert _sum(_read(ReasoningParser(PlainText(), inside=False), pieces)) == (content, reasoning, [])


@pytest.mark.parametrize("text", ["Hm.\n</think>\n\nYes.", "\nHm.</think>Yes."])
def test_reasoning_may_have_been_opened_by_the_prompt(text: str) -> None:
    for pieces in ([text], list(text)):
        assert _sum(_read(ReasoningParser(PlainText(), inside=True), pieces)) == ("Yes.", "Hm.", [])


def test_calls_follow_reasoning() -> None:
    text = "<think>\nA <tool_call>?\n</think>\n\n" + _hermes(_object("look"))
    for pieces in ([text], list(text)):
        parser = ReasoningParser(HERMES.parser(NAMES, None), inside=False)
        assert _loaded(_sum(_read(parser, pieces))) == ("", "A <tool_call>?", [("look", LOOK)])


PLACES: dict[str, Any] = {
    "type": "object",
    "properties": {"where": {"enum": ["up", "} </tool_call>"]}, "n": {"type": "integer"}},
    "required": ["where"],
}
FUNCTIONS: list[Function] = [
    ("look", schema_of(PLACES)),
    ("listen", schema_of(None)),
    ("look_up", schema_of(PLACES)),
]


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("call_format", CALL_FORMATS)
def test_what_the_grammar_of_a_form_allows_is_read_as_calls(
    call_format: CallFormat, several: bool, thinks: bool
) -> None:
    """Characters are chosen at random of those that are allowed."""
    rules = call_format.grammar(FUNCTIONS, quoted, several=several)
    start = f"start: thoughts calls\n{reasoning.grammar(quoted)}" if thinks else "start: calls"
    compiled = LLMatcher(LLTokenizer(TokenizerWrapper(Bytes())), f"{start}\n{rules}")
    assert not compiled.is_error(), compiled.get_error()
    numbers = Random(7)
    for _ in range(20):
        matcher = Matcher(compiled.deep_copy(), END + 1)
        written = bytearray(b"Hm.</think>" if thinks else b"")
        for byte in written:
            matcher.accept(byte)
        while END not in (allowed := [int(token) for token in matcher.allowed()]) or numbers.random() < 0.3:
            choices = [token for token in allowed if token != END]
            if not choices:
                break
            written.append(numbers.choice(choices))
            matcher.accept(written[-1])
        parser = ReasoningParser(call_format.parser(NAMES, None), inside=thinks)
        content, thought, calls = _loaded(_sum(_read(parser, [written.decode()])))
        assert (content, thought) == ("", "Hm." if thinks else "")
        assert calls
        assert len(calls) == 1 or several
        for name, arguments in calls:
            jsonschema.validate(arguments, dict(FUNCTIONS)[name])


@pytest.mark.parametrize(
    ("template", "call_format"),
    [
        ("{{ '[TOOL_CALLS] [' }}", MISTRAL),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", MISTRAL_NAMED),
        ("{{ '<tool_call>\\n' }}", HERMES),
        ("{% if builtin_tools %}{{ '<|python_tag|>' }}{% endif %}", LLAMA),
        ("put it in the format of [func_name1(params_name1=params_value1...)]", GEMMA),
        ("{% for tool in tools %}{{ tool }}{% endfor %}", HERMES),
    ],
)
def test_the_form_of_calls_is_that_of_the_template(template: str, call_format: CallFormat) -> None:
    assert call_format_of(template) is call_format
