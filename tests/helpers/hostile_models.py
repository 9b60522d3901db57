"""GGUF files that nobody should have made: good but for their tokenizer or template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tiny_models import ARCHITECTURES, HIDDEN, Random, llama_layer, ones

Metadata = dict[str, Any]

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
ROOT = "tokenizer.ggml"
CHATML = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


def pieces(*more: str, n_bytes: int = 256) -> Metadata:
    """A SentencePiece vocabulary."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(n_bytes)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, "\u2581", *LETTERS, *more]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * n_bytes]
    types += [NORMAL] * (len(tokens) - len(types))
    return {
        f"{ROOT}.model": "llama",
        f"{ROOT}.tokens": tokens,
        f"{ROOT}.scores": [0.0] * len(tokens),
        f"{ROOT}.token_type": types,
        f"{ROOT}.bos_token_id": 1,
        f"{ROOT}.eos_token_id": 2,
        "tokenizer.chat_template": CHATML,
    }


def pairs(*merges: str) -> Metadata:
    """A byte-level vocabulary."""
    tokens = [*LETTERS, "ab", "<s>"]
    return {
        f"{ROOT}.model": "gpt2",
        f"{ROOT}.pre": "smollm",
        f"{ROOT}.tokens": tokens,
        f"{ROOT}.token_type": [NORMAL] * (len(tokens) - 1) + [CONTROL],
        f"{ROOT}.merges": list(merges),
        f"{ROOT}.bos_token_id": len(tokens) - 1,
        f"{ROOT}.eos_token_id": len(tokens) - 1,
        "tokenizer.chat_template": CHATML,
    }


def without(key: str) -> Callable[[], Metadata]:
    return lambda: {name: value for name, value in pieces().items() if name != f"{ROOT}.{key}"}


def having(key: str, value: Any) -> Callable[[], Metadata]:
    return lambda: pieces() | {f"{ROOT}.{key}": value}


def template(source: str | bytes) -> Metadata:
    return pieces() | {"tokenizer.chat_template": source}


def without_bytes() -> Metadata:
    """It knows what is printable of ASCII; llama.cpp aborts at any other text."""
    printable = [chr(code) for code in range(0x21, 0x7F) if chr(code) not in LETTERS]
    return pieces(*printable, n_bytes=0)


# None of these can be served.
REFUSED: dict[str, Callable[[], Metadata]] = {
    "equal_tokens": lambda: pieces(*["same"] * 300),
    "equal_pairs": lambda: pairs() | {f"{ROOT}.tokens": ["a"] * 28},
    "rwkv": lambda: pieces() | {f"{ROOT}.model": "rwkv"},
    "rwkv_long": lambda: {
        f"{ROOT}.model": "rwkv",
        f"{ROOT}.tokens": [f"{number:x}" * 200 for number in range(20_000)],
    },
    "no_bytes_at_all": lambda: pieces(n_bytes=0),
    "unknown_model": having("model", "nobody's"),
    "model_is_a_number": having("model", 7),
    "no_model": without("model"),
    "no_tokens": without("tokens"),
    "tokens_are_numbers": having("tokens", [1, 2, 3]),
    "tokens_are_none": having("tokens", ""),
    "scores_are_texts": having("scores", ["a", "b"]),
    "types_are_texts": having("token_type", ["a", "b"]),
    "few_scores": having("scores", [0.0]),
    "few_types": having("token_type", [1]),
    "no_merges": lambda: {k: v for k, v in pairs().items() if not k.endswith("merges")},
    "unknown_pre": lambda: pairs() | {f"{ROOT}.pre": "nobody's"},
    "template_not_utf8": lambda: template(b"{{ messages }} \xff\xfe"),
    "template_not_jinja": lambda: template("{% for x in %}"),
    "template_deep": lambda: template("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}"),
    "template_nested": lambda: template("{% if 1 %}" * 3000 + "{% endif %}" * 3000),
}


def written(path: Path, metadata: Metadata) -> Path:
    """A model with random weights and this tokenizer."""
    architecture = ARCHITECTURES["full"]
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_uint32("llama.block_count", 1)
    for key, value in architecture.metadata.items():
        _add(writer, f"llama.{key}", value)
    for key, value in metadata.items():
        _add(writer, key, value)
    tokens = metadata.get(f"{ROOT}.tokens")
    n_tokens = len(tokens) if isinstance(tokens, list) else 10
    random = Random()
    tensors = {
        "token_embd.weight": random.matrix(n_tokens, HIDDEN, 0.5),
        "output_norm.weight": ones(HIDDEN),
        "output.weight": random.matrix(n_tokens, HIDDEN, 4),
    }
    tensors |= {f"blk.0.{name}": tensor for name, tensor in llama_layer(random).items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bytes():
            writer.add_key_value(key, value, gguf.GGUFValueType.STRING)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case float():
            writer.add_float32(key, value)
        case int():
            writer.add_uint32(key, value)
