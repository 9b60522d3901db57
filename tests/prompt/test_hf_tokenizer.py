"""Tokenizers read from tokenizer.json: ids as the library gives them, and back to just the text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from headstart.errors import StartupError
from headstart.prompt.hf_tokenizer import HfTokenizer
from headstart.prompt.prompts import Prompts
from headstart.prompt.template import ChatTemplate
from headstart.prompt.tokenizer import load_tokenizer
from headstart.prompt.toy_tokenizer import ToyTokenizer
from headstart.toyspec import BOS, END, START
from rkllm_models import tokenizer_files, toy_tokenizer

TEXTS = [
    "",
    "Hi",
    "the others\n\n\ndefine  usings,   in\ndef the",
    "naïve 二十四 👩🏽‍💻\n",
    "<|im_start|>system\nYou are the one.<|im_end|>\n<|im_start|>user\nthe<|im_end|>\n",
    " <s>leading and trailing </s> ",
]
SPECIALS = [AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>")]
CORPUS = [*TEXTS, "It's the other one, isn't it? 1 + 23 = 24", "Where the weather is, there we are."] * 20


def folder_of(tokenizer: Tokenizer, folder: Path, **config: object) -> str:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder / "model.rkllm")


def byte_level() -> Tokenizer:
    """As Qwen's and Llama 3's are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def sentence_piece(
    normalizer: normalizers.Normalizer | None, pre: pre_tokenizers.PreTokenizer | None
) -> Tokenizer:
    """As Llama 2's are: spaces are written as a sign, one is put before the text, and bytes stand in."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted({c for text in CORPUS for c in text if c.isascii() and c.isprintable()} - {" "})
    vocabulary = ["<unk>", *byte_tokens, "\u2581", *letters, "\u2581t", "he", "\u2581the"]
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he")]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: i for i, text in enumerate(vocabulary)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre:
        tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


LEGACY = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
KINDS = {
    "toy": toy_tokenizer,
    "byte level": byte_level,
    "a space before each part": lambda: sentence_piece(LEGACY, None),
    "a space before the first part": lambda: sentence_piece(
        None, pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    ),
    "no space before": lambda: sentence_piece(normalizers.Replace(" ", "\u2581"), None),
}


@pytest.fixture(params=KINDS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return folder_of(KINDS[request.param](), tmp_path)


def test_tokens_become_the_text_that_they_were_made_from(path: str) -> None:
    tokenizer = HfTokenizer(path)
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        # Whether a text begins with a space is nothing that Metaspace's tokens tell.
        assert tokenizer.text(tokens).lstrip(" ") == text.lstrip(" ")
        assert tokenizer.encode(tokenizer.text(tokens)) == tokens


def test_prompts_cut_at_special_tokens_have_the_same_tokens_as_whole_ones(path: str) -> None:
    tokenizer = HfTokenizer(path)
    prompts = Prompts(tokenizer, ChatTemplate(None, "", ""))
    for text in TEXTS:
        assert prompts.text(text) == tokenizer.encode(text)


def test_a_cached_opening_ends_with_a_special_token(path: str) -> None:
    tokenizer = HfTokenizer(path)
    prompts = Prompts(tokenizer, ChatTemplate(None, "", ""))
    opening = prompts.chat_opening([{"role": "system", "content": "You are the one."}])
    assert tokenizer.text(opening) == "<|im_start|>system\nYou are the one.<|im_end|>\n<|im_start|>"
    whole = prompts.chat(
        [{"role": "system", "content": "You are the one."}, {"role": "user", "content": "x"}]
    )
    assert whole[: len(opening)] == opening


def test_pieces_of_an_answer_are_bytes_and_special_tokens_are_none(path: str) -> None:
    tokenizer = HfTokenizer(path)
    for text in ("naïve 👩🏽‍💻 the", "the end"):
        written = b"".join(map(tokenizer.piece, tokenizer.encode(text)))
        assert written.decode().removeprefix(" ") == text
    assert [tokenizer.piece(token) for token in tokenizer.encode("<|im_end|>")][-1] == b""


def test_added_tokens_that_are_not_special_belong_to_the_answer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(byte_level(), tmp_path))
    assert b"".join(map(tokenizer.piece, tokenizer.encode("<think>so"))) == b"<think>so"


def test_an_id_that_the_vocabulary_does_not_have_stands_for_nothing(path: str) -> None:
    assert HfTokenizer(path).piece(1 << 30) == b""


def test_the_toy_tokenizer_of_the_tests_is_the_toy_models(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(toy_tokenizer(), tmp_path))
    toy = ToyTokenizer("toy:")
    for text in TEXTS:
        assert [BOS, *tokenizer.encode(text)] == toy.encode(f"<s>{text}")
    assert tokenizer.ends >= {START, END}


def test_the_template_comes_from_the_configuration_or_from_its_own_file(tmp_path: Path) -> None:
    path = folder_of(toy_tokenizer(), tmp_path, chat_template="one", eos_token={"content": "</s>"})
    assert (HfTokenizer(path).template, HfTokenizer(path).eos_text) == ("one", "</s>")
    several = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    path = folder_of(toy_tokenizer(), tmp_path, chat_template=several, bos_token="<s>")
    assert (HfTokenizer(path).template, HfTokenizer(path).bos_text) == ("three", "<s>")
    (tmp_path / "chat_template.jinja").write_text("four")
    assert HfTokenizer(path).template == "four"


def test_without_a_configuration_there_is_no_template(tmp_path: Path) -> None:
    tokenizer_files(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(str(tmp_path / "model.rkllm")).template is None


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"tokenizer.json": None}, "tokenizer.json and tokenizer_config.json of the model"),
        ({"tokenizer.json": "{}"}, "is no tokenizer"),
        ({"tokenizer_config.json": "[1]"}, "no JSON object"),
        ({"tokenizer_config.json": "[" * 100_000}, "can't be read"),
        ({"chat_template.jinja": b"\xff\xfe"}, "can't be read"),
    ],
)
def test_a_folder_with_something_wrong_is_refused_by_name(
    tmp_path: Path, damage: dict[str, str | bytes | None], words: str
) -> None:
    tokenizer_files(tmp_path)
    for name, content in damage.items():
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StartupError, match=words):
        HfTokenizer(str(tmp_path / "model.rkllm"))


def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
    path = folder_of(tokenizer, tmp_path)
    # What is lost isn't there any more when the text is tokenised again, so this one is no problem.
    assert HfTokenizer(path).encode(" THE ") == HfTokenizer(path).encode("the")
    broken = Tokenizer(models.WordLevel({"Why": 0, "?": 1, "<unk>": 2}, unk_token="<unk>"))
    broken.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(StartupError, match="can't be turned back into their text"):
        HfTokenizer(folder_of(broken, tmp_path))
