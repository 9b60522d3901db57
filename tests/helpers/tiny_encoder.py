"""A BERT of a few hundred kilobytes with random weights, which reads words in both directions."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from tiny_models import Random, Tensors, ones

CTX, HIDDEN, FFN, HEADS, LAYERS = 512, 64, 128, 4, 2
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)
WORDS = ["the", "cat", "sat", "lay", "ran", "on", "mat", "tide", "goes", "out", "at", "noon", "rope", "lamp"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?"
# As llama.cpp writes WordPiece: what begins a word has the mark, what continues one has none.
TOKENS = [*SPECIALS, *(f"▁{text}" for text in [*WORDS, *LETTERS]), *LETTERS]
POOLINGS = {"mean": gguf.PoolingType.MEAN, "first": gguf.PoolingType.CLS, "rank": gguf.PoolingType.RANK}


def written(path: Path, pooling: str = "mean") -> Path:
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_file_type(0)
    writer.add_block_count(LAYERS)
    writer.add_context_length(CTX)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(POOLINGS[pooling])
    _add_tokenizer(writer)
    for name, tensor in _tensors().items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    kinds = [gguf.TokenType.CONTROL] * len(SPECIALS) + [gguf.TokenType.NORMAL] * (len(TOKENS) - len(SPECIALS))
    writer.add_token_types(kinds)
    writer.add_token_type_count(2)
    writer.add_bos_token_id(CLS)
    writer.add_sep_token_id(SEP)
    writer.add_unk_token_id(UNK)
    writer.add_pad_token_id(PAD)
    writer.add_mask_token_id(MASK)


def _tensors() -> Tensors:
    random = Random()
    tensors = {
        "token_embd.weight": random.matrix(len(TOKENS), HIDDEN, 4),
        "token_types.weight": random.matrix(2, HIDDEN, 0.1),
        "position_embd.weight": random.matrix(CTX, HIDDEN),
        **_norm("token_embd_norm"),
    }
    for number in range(LAYERS):
        tensors |= {f"blk.{number}.{name}": tensor for name, tensor in _layer(random).items()}
    return tensors


def _layer(random: Random) -> Tensors:
    shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (HIDDEN, HIDDEN))
    shapes |= {"ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN)}
    layer = {**_norm("attn_output_norm"), **_norm("layer_output_norm")}
    for name, (rows, columns) in shapes.items():
        layer[f"{name}.weight"] = random.matrix(rows, columns, 2)
        layer[f"{name}.bias"] = random.between(-0.1, 0.1, rows)
    return layer


def _norm(name: str) -> Tensors:
    return {f"{name}.weight": ones(HIDDEN), f"{name}.bias": np.zeros(HIDDEN, dtype=np.float32)}
