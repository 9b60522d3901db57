"""A model with Qwen3-0.6B's shape and random weights, for timings: they are real, its text is not.

The tokenizer and the chat template are those of the embedded model. Weights are Q8_0. Tied embeddings make a
row of the embedding table the output weights of its token too, so a row of zeros keeps a token from ever
being the most likely one: control tokens and everything but plain words have one. Greedy answers thus never
end by themselves, and every token of them is whole text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAME = "qwen3-shape"
BLOCK = 32
SCALE = np.float16(0.02 / 73)
# As the byte-level vocabulary spells " word" and "word".
WORD = re.compile("Ġ?[A-Za-z]+")
COPIED = "tokenizer."

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Shape:
    layers: int = 28
    heads: int = 16
    kv_heads: int = 8
    head: int = 128
    hidden: int = 1024
    ffn: int = 3072
    ctx: int = 40960

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of a layer's matrices."""
        queries, keys = self.heads * self.head, self.kv_heads * self.head
        return {
            "attn_q": (queries, self.hidden),
            "attn_k": (keys, self.hidden),
            "attn_v": (keys, self.hidden),
            "attn_output": (self.hidden, queries),
            "ffn_gate": (self.ffn, self.hidden),
            "ffn_up": (self.ffn, self.hidden),
            "ffn_down": (self.hidden, self.ffn),
        }

    def norms(self) -> dict[str, int]:
        return {
            "attn_norm": self.hidden,
            "attn_q_norm": self.head,
            "attn_k_norm": self.head,
            "ffn_norm": self.hidden,
        }


def written(path: Path, tokenizer_from: str, shape: Shape | None = None) -> Path:
    """The model's file, written to `path` unless it is there; about 540 MB."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        _write(partial, tokenizer_from, shape or Shape())
        partial.rename(path)
    return path


def random_q8(rows: int, columns: int, random: np.random.Generator) -> Bytes:
    """A Q8_0 matrix as bytes: of each block of 32 weights a scale (float16) and 32 signed bytes."""
    blocks = rows * columns // BLOCK
    data = np.empty((blocks, 2 + BLOCK), dtype=np.uint8)
    data[:, :2] = np.frombuffer(SCALE.tobytes(), dtype=np.uint8)
    data[:, 2:] = random.integers(-127, 128, (blocks, BLOCK), dtype=np.int8).view(np.uint8)
    return data.reshape(rows, -1)


def embeddings(tokens: list[str], hidden: int, random: np.random.Generator) -> Bytes:
    """One row a token, of zeros for those that are never to be generated."""
    data = random_q8(len(tokens), hidden, random)
    data[[not WORD.fullmatch(token) for token in tokens]] = 0
    return data


def _write(path: Path, tokenizer_from: str, shape: Shape) -> None:
    import gguf

    reader = gguf.GGUFReader(tokenizer_from)
    writer = gguf.GGUFWriter(path, "qwen3")
    _describe(writer, shape)
    for name, field in reader.fields.items():
        if name.startswith(COPIED):
            copy_field(writer, name, field)
    random = np.random.default_rng(0)
    q8 = gguf.GGMLQuantizationType.Q8_0
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    writer.add_tensor("token_embd.weight", embeddings(tokens, shape.hidden, random), raw_dtype=q8)
    writer.add_tensor("output_norm.weight", np.ones(shape.hidden, dtype=np.float32))
    for layer in range(shape.layers):
        for name, size in shape.norms().items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(size, dtype=np.float32))
        for name, (rows, columns) in shape.matrices().items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", random_q8(rows, columns, random), raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, shape: Shape) -> None:
    writer.add_name("Qwen3-0.6B's shape, random weights")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.ctx)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(7)


def copy_field(writer: Any, name: str, field: Any, contents: Any = None) -> None:
    """Writes a metadata field as another file has it, or with other `contents`."""
    kind, *parts = field.types
    value = field.contents() if contents is None else contents
    writer.add_key_value(name, value, kind, sub_type=parts[0] if parts else None)
