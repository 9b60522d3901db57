"""How far other arithmetic is from the model file's own: `python -m bench.divergence`.

Compared is what the embedded model predicts after each of 1,024 tokens of English text: with flash attention,
with weights converted to q8_0, and with both, against the file's weights without flash attention. Printed are
the mean Kullback-Leibler divergence from the latter, in nats, at how many positions the most likely token is
the same, and the perplexity.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import llama_cpp as lib
import numpy as np

from headstart.engine.llama.context import LlamaContext, Shape
from headstart.engine.llama.conversion import weights_path
from headstart.engine.llama.converted_weights import conversions_of
from headstart.engine.llama.gguf import open_model
from headstart.engine.model import Piece
from headstart.machine import available_cpus
from headstart.model_files import embedded_model
from headstart.numerics import DEFAULT, Numerics
from headstart.prompt.tokenizer import load_tokenizer
from headstart.protocol import EngineSettings

N_TOKENS = 1024
CHUNK = 64
OTHERS = (Numerics(True, "file"), Numerics(False, "q8_0"), Numerics(True, "q8_0"))

Array = np.ndarray[Any, np.dtype[np.float64]]


def main() -> None:
    text = files("headstart.cli").joinpath("guidelines.txt").read_text(encoding="utf-8")
    tokens = load_tokenizer(embedded_model()).encode(text)[:N_TOKENS]
    print(f"{f'{len(tokens)} tokens':35s} mean KL  same token  perplexity")
    with TemporaryDirectory() as directory:
        base = log_probabilities(DEFAULT, tokens, Path(directory))
        report(DEFAULT, base, base, tokens)
        for numerics in OTHERS:
            report(numerics, log_probabilities(numerics, tokens, Path(directory)), base, tokens)


def log_probabilities(numerics: Numerics, tokens: list[int], directory: Path) -> Array:
    """Of the whole vocabulary after each token."""
    settings = EngineSettings(
        embedded_model(), 1, 0, numerics=numerics, conversions=conversions_of("source", directory)
    )
    model = open_model(weights_path(settings))
    shape = Shape(
        cells=len(tokens),
        sequences=1,
        streams=True,
        batch=CHUNK,
        threads=available_cpus(),
        flash_attention=bool(numerics.flash_attention),
    )
    context = LlamaContext(model, shape)
    rows = np.concatenate([logits(context, tokens, start) for start in range(0, len(tokens), CHUNK)])
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    lib.llama_free(context.context)
    lib.llama_model_free(model)
    return rows


def logits(context: LlamaContext, tokens: list[int], start: int) -> Array:
    part = tokens[start : start + CHUNK]
    context.evaluate([Piece(0, start + i, [token], sample=True) for i, token in enumerate(part)])
    rows = [lib.llama_get_logits_ith(context.context, i) for i in range(len(part))]
    return np.array([np.ctypeslib.as_array(row, (context.n_vocab,)) for row in rows], dtype=np.float64)


def report(numerics: Numerics, found: Array, base: Array, tokens: list[int]) -> None:
    divergence = (np.exp(base) * (base - found)).sum(axis=1).mean()
    same = (found.argmax(axis=1) == base.argmax(axis=1)).mean()
    perplexity = np.exp(-found[np.arange(len(tokens) - 1), tokens[1:]].mean())
    name = ", ".join(f"{part.replace('_', ' ')} {value}" for part, value in numerics.shown().items())
    print(f"{name:35s} {divergence:.1e}  {same:9.1%}  {perplexity:10.2f}", flush=True)


if __name__ == "__main__":
    main()
