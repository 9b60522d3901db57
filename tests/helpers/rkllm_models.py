"""Model folders as users have them: `model.rkllm`, and the tokenizer files of the model it was made from.

The tokenizer is the one that the stand-in runtime has: bytes, merged greedily from the left, and control
tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from headstart.prompt.hf_tokenizer import ALPHABET
from headstart.prompt.template import BUILT_IN
from headstart.toyspec import CONTROL, MERGES, N_BYTES

BYTES = {byte: character for character, byte in ALPHABET.items()}


def spelled(piece: bytes) -> str:
    """As a byte-level vocabulary writes it."""
    return "".join(BYTES[byte] for byte in piece)


def toy_tokenizer() -> Tokenizer:
    """Tokenises as `headstart.prompt.tokenizer.ToyTokenizer` does, but for the leading token."""
    vocabulary = {spelled(bytes([byte])): byte for byte in range(N_BYTES)}
    vocabulary |= {spelled(merge): N_BYTES + i for i, merge in enumerate(MERGES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    longest_first = sorted(MERGES, key=len, reverse=True)
    words = "|".join(merge.decode() for merge in longest_first) + r"|[\s\S]"
    cut = pre_tokenizers.Split(Regex(words), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, spell])
    tokenizer.decoder = decoders.ByteLevel()
    in_order = sorted(CONTROL, key=lambda text: CONTROL[text])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in in_order])
    assert {text: tokenizer.token_to_id(text) for text in CONTROL} == CONTROL
    return tokenizer


def tokenizer_files(folder: Path, template: str = "chatml") -> None:
    toy_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": None,
        "eos_token": {"content": "<|im_end|>", "special": True},
        "chat_template": BUILT_IN[template],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
