"""Model files with metadata that no model has, and files that are none."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import gguf
from hypothesis import strategies as st

from fuzz.victim import Refused, Victim

Json = dict[str, Any]

NAME = "attack"


def _known(**more: Any) -> Json:
    return {"kind": "models", **more}


KNOWN: list[Json] = [
    _known(vocabulary="gpt2", tokens=300, equal=True),
    _known(vocabulary="gpt2", tokens=300, equal=True, merges=["a b"], pre="gpt-2"),
    _known(vocabulary="llama", tokens=300),
    _known(vocabulary="rwkv", tokens=300),
    _known(vocabulary="rwkv", tokens=300, equal=True, architecture="rwkv6"),
    _known(vocabulary="t5", tokens=50),
    _known(vocabulary="bert", tokens=0),
    _known(vocabulary="gpt2", tokens=300, template=[255, 254, 123]),
    _known(vocabulary="gpt2", tokens=300, template=[*b"{% for i in range(10**9) %}{% endfor %}"]),
    *(_known(vocabulary="gpt2", tokens=20, cut=n) for n in (0, 3, 4, 20, 24, 100, 400)),
    *(_known(vocabulary="gpt2", tokens=20, flips=[[place, 255]]) for place in (4, 8, 15, 16, 23, 24, 31, 40)),
]


def recipes() -> st.SearchStrategy[Json]:
    numbers = st.one_of(st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1]), st.integers(0, 4096))
    return st.fixed_dictionaries(
        {
            "kind": st.just("models"),
            "vocabulary": st.sampled_from(["gpt2", "llama", "rwkv", "bert", "t5", "x"]),
        },
        optional={
            "architecture": st.sampled_from(
                ["llama", "rwkv6", "mamba", "bert", "gpt2", "t5", "qwen3", "x", ""]
            ),
            "tokens": st.integers(0, 400),
            "equal": st.booleans(),
            "scores": st.integers(0, 400),
            "types": st.integers(0, 400),
            "merges": st.lists(st.text(max_size=4), max_size=4),
            "pre": st.sampled_from(["default", "gpt-2", "llama-bpe", "x", ""]),
            "numbers": st.dictionaries(
                st.sampled_from(
                    ["block_count", "context_length", "embedding_length", "attention.head_count"]
                ),
                numbers,
            ),
            "bos": numbers,
            "eos": numbers,
            "template": st.lists(st.integers(0, 255), max_size=30),
            "flips": st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 255)).map(list), max_size=3),
            "cut": st.integers(0, 5000),
        },
    )


def attack(victim: Victim, recipe: Json) -> None:
    path = victim.models / f"{NAME}.gguf"
    write(path, recipe)
    chat = json.dumps(
        {"model": NAME, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    ).encode()
    try:
        with contextlib.suppress(Refused):
            victim.send("GET", "/v1/models")
            victim.send("POST", "/v1/chat/completions", chat)
            victim.send("POST", "/tokenize", json.dumps({"model": NAME, "content": "a b \u00e9"}).encode())
            victim.send("POST", "/v1/models/unload", json.dumps({"model": NAME, "force": True}).encode())
    finally:
        path.unlink()


def write(path: Path, recipe: Json) -> None:
    architecture = recipe.get("architecture", "llama")
    writer = gguf.GGUFWriter(path, architecture or "llama")
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 32, "attention.head_count": 4}
    for key, number in (sizes | recipe.get("numbers", {})).items():
        writer.add_uint32(f"{architecture}.{key}", number)
    writer.add_tokenizer_model(recipe["vocabulary"])
    writer.add_tokenizer_pre(recipe.get("pre", "default"))
    n = recipe.get("tokens", 0)
    if n:
        writer.add_token_list(["same" if recipe.get("equal") else f"t{i}" for i in range(n)])
    if recipe.get("scores"):
        writer.add_token_scores([0.0] * recipe["scores"])
    if recipe.get("types"):
        writer.add_token_types([1] * recipe["types"])
    if recipe.get("merges"):
        writer.add_token_merges(recipe["merges"])
    for key in ("bos", "eos"):
        if key in recipe:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", recipe[key])
    mark = "x" * len(recipe.get("template", []))
    if mark:
        writer.add_chat_template("<<" + mark + ">>")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = bytearray(path.read_bytes())
    if mark:
        content = content.replace(b"<<" + mark.encode(), b"  " + bytes(recipe["template"]), 1)
    for place, bits in recipe.get("flips", []):
        content[place % len(content)] ^= bits
    path.write_bytes(content[: recipe["cut"]] if "cut" in recipe else content)
