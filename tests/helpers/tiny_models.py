"""Model files of a few hundred kilobytes with random weights, one of each kind of memory, written here.

The tokenizer and the chat template are the embedded model's, with its first 1,024 tokens. The answers are
words: only " word" tokens can be generated, so that text goes back to the tokens it came from. What is said
depends on the whole history, not on the last tokens alone: embeddings are small beside what layers add.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from bench.random_model import copy_field
from headstart.model_files import embedded_model

N_TOKENS = 1024
CTX = 4096
HIDDEN, FFN, HEADS, HEAD = 64, 128, 4, 16
WINDOW = 64
# Of state space layers.
INNER, STATE, CONV, RANK = 2 * HIDDEN, 16, 4, 4
# Of LFM2's short convolutions.
CONVOLVED = 3
# As the byte-level vocabulary spells " word".
WORD = re.compile("Ġ[A-Za-z]+")
FILE_TYPES = {
    gguf.GGMLQuantizationType.F32: 0,
    gguf.GGMLQuantizationType.Q4_1: 3,
    gguf.GGMLQuantizationType.Q8_0: 7,
}

Floats = NDArray[np.float32]
Tensors = dict[str, Floats]


class Random:
    def __init__(self) -> None:
        self.numbers = np.random.default_rng(7)

    def matrix(self, rows: int, columns: int, gain: float = 1.0) -> Floats:
        """Keeps the size of what it is applied to, times `gain`."""
        return (self.numbers.standard_normal((rows, columns)) * gain / columns**0.5).astype(np.float32)

    def between(self, low: float, high: float, *shape: int) -> Floats:
        return self.numbers.uniform(low, high, shape).astype(np.float32)


@dataclass(frozen=True)
class Architecture:
    """`metadata`: under the architecture's name. `layers`: what makes the tensors of each layer."""

    name: str
    metadata: dict[str, Any]
    layers: tuple[Callable[[Random], Tensors], ...]
    output_norm: str = "output_norm"


def ones(n: int) -> Floats:
    return np.ones(n, dtype=np.float32)


def attention(random: Random, gain: float = 2.0) -> Tensors:
    """Queries and keys are large, so that a few tokens get most of the attention."""
    return {
        "attn_norm.weight": ones(HIDDEN),
        "attn_q.weight": random.matrix(HIDDEN, HIDDEN, gain),
        "attn_k.weight": random.matrix(HIDDEN, HIDDEN, gain),
        "attn_v.weight": random.matrix(HIDDEN, HIDDEN, gain),
        "attn_output.weight": random.matrix(HIDDEN, HIDDEN, gain),
    }


def normed(tensors: Tensors, size: float = 1.0) -> Tensors:
    """With norms of queries and keys."""
    return tensors | {"attn_q_norm.weight": size * ones(HEAD), "attn_k_norm.weight": size * ones(HEAD)}


def feed_forward(random: Random) -> Tensors:
    return {
        "ffn_norm.weight": ones(HIDDEN),
        "ffn_gate.weight": random.matrix(FFN, HIDDEN),
        "ffn_up.weight": random.matrix(FFN, HIDDEN),
        "ffn_down.weight": random.matrix(HIDDEN, FFN),
    }


def state_space(random: Random) -> Tensors:
    """A Mamba layer whose state forgets slowly."""
    return {
        "attn_norm.weight": ones(HIDDEN),
        "ssm_in.weight": random.matrix(2 * INNER, HIDDEN),
        "ssm_conv1d.weight": random.matrix(INNER, CONV),
        "ssm_conv1d.bias": random.between(-0.1, 0.1, INNER),
        "ssm_x.weight": random.matrix(RANK + 2 * STATE, INNER, 2),
        "ssm_dt.weight": random.matrix(INNER, RANK),
        "ssm_dt.bias": random.between(-1, 1, INNER),
        "ssm_a": -random.between(0.001, 0.05, INNER, STATE),
        "ssm_d": random.between(-0.1, 0.1, INNER),
        "ssm_out.weight": random.matrix(HIDDEN, INNER, 2),
    }


def normed_state_space(random: Random) -> Tensors:
    """Jamba's, with norms inside."""
    norms = {"ssm_dt_norm.weight": RANK, "ssm_b_norm.weight": STATE, "ssm_c_norm.weight": STATE}
    return state_space(random) | {name: ones(size) for name, size in norms.items()}


def convolution(random: Random) -> Tensors:
    return {
        "attn_norm.weight": ones(HIDDEN),
        "shortconv.conv.weight": random.matrix(HIDDEN, CONVOLVED),
        "shortconv.in_proj.weight": random.matrix(3 * HIDDEN, HIDDEN),
        "shortconv.out_proj.weight": random.matrix(HIDDEN, HIDDEN),
    }


def llama_layer(random: Random) -> Tensors:
    return attention(random) | feed_forward(random)


def biased_layer(random: Random) -> Tensors:
    zeros = np.zeros(HIDDEN, dtype=np.float32)
    return llama_layer(random) | {f"attn_{name}.bias": zeros for name in "qkv"}


def gemma_layer(random: Random) -> Tensors:
    norms = {"post_attention_norm.weight": ones(HIDDEN), "post_ffw_norm.weight": ones(HIDDEN)}
    return normed(attention(random), 2) | feed_forward(random) | norms


def jamba_layer(random: Random) -> Tensors:
    return normed_state_space(random) | feed_forward(random)


def lfm2_attention(random: Random) -> Tensors:
    return normed(attention(random), 2) | feed_forward(random)


def lfm2_convolution(random: Random) -> Tensors:
    return convolution(random) | feed_forward(random)


COMMON: dict[str, Any] = {
    "context_length": CTX,
    "embedding_length": HIDDEN,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": HEADS,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
HEAD_SIZES: dict[str, Any] = {"attention.key_length": HEAD, "attention.value_length": HEAD}
STATE_SPACE: dict[str, Any] = {
    "ssm.conv_kernel": CONV,
    "ssm.inner_size": INNER,
    "ssm.state_size": STATE,
    "ssm.time_step_rank": RANK,
}
LFM2 = Architecture(
    "lfm2",
    COMMON | {"attention.head_count_kv": [0, HEADS, 0, HEADS], "shortconv.l_cache": CONVOLVED},
    (lfm2_convolution, lfm2_attention) * 2,
    output_norm="token_embd_norm",
)
ARCHITECTURES = {
    "full": Architecture("llama", COMMON | {"rope.dimension_count": HEAD}, (llama_layer,) * 2),
    # Three layers with the window, then one without.
    "window": Architecture(
        "gemma3",
        COMMON
        | HEAD_SIZES
        | {"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": [True] * 3 + [False]},
        (gemma_layer,) * 4,
    ),
    "hybrid": Architecture(
        "jamba",
        COMMON | STATE_SPACE | {"attention.head_count_kv": [0, HEADS, 0]},
        (jamba_layer, llama_layer, jamba_layer),
    ),
    "convolutions": LFM2,
    "recurrent": Architecture(
        "mamba",
        COMMON
        | STATE_SPACE
        | {"feed_forward_length": 0, "attention.head_count": 0, "attention.head_count_kv": 0},
        (state_space,) * 3,
    ),
    "hybrid-window": Architecture(
        "lfm2", {**LFM2.metadata, "attention.sliding_window": WINDOW}, LFM2.layers, LFM2.output_norm
    ),
}

# Its tokens have a position in several dimensions, which a state keeps for each.
POSITIONS = Architecture("qwen2vl", COMMON | {"rope.dimension_sections": [2, 3, 3, 0]}, (biased_layer,) * 2)


def written(
    path: Path, kind: str, weights: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32
) -> Path:
    """The file of one of ARCHITECTURES, or of POSITIONS. Only matrices with rows of whole blocks have the
    format `weights`."""
    architecture = (ARCHITECTURES | {"positions": POSITIONS})[kind]
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_file_type(FILE_TYPES[weights])
    writer.add_uint32(f"{architecture.name}.block_count", len(architecture.layers))
    for key, value in architecture.metadata.items():
        _add(writer, f"{architecture.name}.{key}", value)
    tokens = _add_tokenizer(writer)
    for name, tensor in _tensors(architecture, tokens).items():
        fits = tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and "conv" not in name
        kept = gguf.quants.quantize(tensor, weights) if fits else tensor
        writer.add_tensor(name, kept, raw_dtype=weights if fits else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(architecture: Architecture, tokens: list[str]) -> Tensors:
    random = Random()
    output = random.matrix(len(tokens), HIDDEN, 4)
    output[[not WORD.fullmatch(token) for token in tokens]] = 0
    tensors = {
        "token_embd.weight": random.matrix(len(tokens), HIDDEN, 0.5),
        f"{architecture.output_norm}.weight": ones(HIDDEN),
        "output.weight": output,
    }
    for number, layer in enumerate(architecture.layers):
        tensors |= {f"blk.{number}.{name}": tensor for name, tensor in layer(random).items()}
    return tensors


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case list():
            writer.add_array(key, value)
        case float():
            writer.add_float32(key, value)
        case int():
            writer.add_uint32(key, value)


@cache
def _embedded_fields() -> Mapping[str, Any]:
    return gguf.GGUFReader(embedded_model()).fields


def _add_tokenizer(writer: gguf.GGUFWriter) -> list[str]:
    """The embedded model's, cut down; its tokens."""
    fields = _embedded_fields()
    tokens = fields["tokenizer.ggml.tokens"].contents()[:N_TOKENS]
    known = set(tokens)
    merges = [
        merge
        for merge in fields["tokenizer.ggml.merges"].contents()
        if known.issuperset((*(parts := merge.split(" ")), "".join(parts)))
    ]
    cut = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": fields["tokenizer.ggml.token_type"].contents()[:N_TOKENS],
        "tokenizer.ggml.merges": merges,
    }
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            copy_field(writer, name, field, cut.get(name))
    return tokens
