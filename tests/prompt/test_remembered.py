"""Prompts tokenised in remembered parts have the tokens they have as a whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.model_files import embedded_model
from headstart.prompt import token_cache
from headstart.prompt.token_cache import Memory, RememberedTokens
from headstart.prompt.tokenizer import Tokenizer, load_tokenizer
from headstart.toyspec import CONTROL

REAL = pytest.param("real", marks=pytest.mark.real_model)
LOADED: dict[str, Tokenizer] = {}
WORDS = [
    "the ",
    "thing",
    "\n\n",
    " ",
    "   ",
    "<",
    "|>",
    "<|im_",
    "start|>",
    "é",
    "🙂",
    "def f():\n    ",
    "x" * 250,
]
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", *CONTROL]
TEXTS = st.lists(st.sampled_from(WORDS + SPECIALS) | st.text(max_size=12), max_size=14).map("".join)


def _tokenizer(kind: str) -> Tokenizer:
    if kind not in LOADED:
        LOADED[kind] = load_tokenizer(embedded_model() if kind == "real" else "toy:")
    return LOADED[kind]


@pytest.mark.parametrize("kind", ["toy", REAL])
@settings(deadline=None, max_examples=200)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
@pytest.mark.slow
def test_parts_have_the_tokens_of_the_whole(kind: str, texts: list[str]) -> None:
    tokenizer = _tokenizer(kind)
    memory = RememberedTokens(tokenizer.encode, tokenizer.specials, "".join(SPECIALS))
    for text in [*texts, *texts]:
        assert memory.encode(text) == tokenizer.encode(text)


class Counting:
    def __init__(self, encode: Callable[[str, bool], list[int]]) -> None:
        self.encode, self.seen = encode, 0

    def __call__(self, text: str, first: bool) -> list[int]:
        self.seen += len(text)
        return self.encode(text, first)


def _memory() -> tuple[RememberedTokens, Counting]:
    tokenizer = _tokenizer("toy")
    counting = Counting(tokenizer.encode)
    return RememberedTokens(counting, tokenizer.specials, "".join(SPECIALS)), counting


def test_of_a_prompt_with_a_known_opening_only_the_new_message_is_tokenised() -> None:
    memory, counting = _memory()
    opening = "<|im_start|>system\n" + "You are the keeper. " * 50 + "<|im_end|>\n<|im_start|>"
    end = "\n<|im_start|>assistant\n"
    memory.encode(f"{opening}user\nWhy?<|im_end|>{end}")
    before = counting.seen
    memory.encode(f"{opening}user\nHow?<|im_end|>{end}")
    assert counting.seen - before == len("user\nHow?<|im_end|>")


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "REMEMBERED_BYTES", 40_000)
    memory, counting = _memory()
    first, others = "a" * 400 + "<|im_end|>", [letter * 400 + "<|im_end|>" for letter in "bc"]
    for text in [first, *others]:
        memory.encode(text)
    before = counting.seen
    memory.encode(others[1])
    assert counting.seen == before
    memory.encode(first)
    assert counting.seen > before


def test_what_is_remembered_twice_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "REMEMBERED_BYTES", 10_000)
    memory = Memory()
    memory.put("one", 10, [1])
    for _ in range(100):
        memory.put("other", 10, [2])
    assert memory.get("one") == [1]


def test_a_text_to_be_continued_is_not_remembered_whole() -> None:
    memory, counting = _memory()
    for _ in range(2):
        memory.encode("Once upon a time. " * 50)
    assert counting.seen == 2 * len("Once upon a time. " * 50)


def test_special_tokens_that_overlap_are_no_place_to_cut() -> None:
    cuts: list[str] = []

    def encode(text: str, _first: bool) -> list[int]:
        cuts.append(text)
        return [0]

    text = "<a>" + "x" * 300 + "<a>" + "y" * 300
    RememberedTokens(encode, ["<a>", "<a>x"], "<a>").encode(text)
    assert cuts == [text]
