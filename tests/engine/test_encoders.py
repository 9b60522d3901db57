"""Models that are made for embeddings, and how the embeddings of tokens become one: as llama.cpp itself does.

The models are tiny, with random weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
import pytest

import tiny_encoder
import tiny_models
from embedding_requests import embed, tokens, vectors
from servers import Json, RunningServer, eventually, running_server

pytestmark = pytest.mark.real_model

POOLINGS = {"mean": lib.LLAMA_POOLING_TYPE_MEAN, "first": lib.LLAMA_POOLING_TYPE_CLS}
TEXTS = ["the cat sat on the mat", "rope", "the tide goes out at noon, the lamp lay on. " * 12]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("encoders")
    models = {kind: tiny_encoder.written(directory / f"{kind}.gguf", kind) for kind in tiny_encoder.POOLINGS}
    models["causal"] = tiny_models.written(directory / "causal.gguf", "full")
    models["recurrent"] = tiny_models.written(directory / "recurrent.gguf", "recurrent")
    flags = [flag for name, path in models.items() for flag in ("--model", f"{name}={path}")]
    # What only embeds must be found out without being measured.
    with running_server(directory / "cache", *flags, "--tune", "--prefill-chunk", "16") as running:
        yield running


def reference(path: Path, given: list[int], pooling: int) -> Any:
    """What llama.cpp makes of tokens in one batch, with its own pooling."""
    lib.llama_log_set(_quiet, None)
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.embeddings, params.pooling_type = True, pooling
    context = lib.llama_init_from_model(model, params)
    array = (lib.llama_token * len(given))(*given)
    assert lib.llama_decode(context, lib.llama_batch_get_one(array, len(given))) == 0
    size = lib.llama_model_n_embd_out(model)
    values = np.ctypeslib.as_array(lib.llama_get_embeddings_seq(context, 0), (size,)).copy()
    lib.llama_free(context)
    lib.llama_model_free(model)
    return values / np.linalg.norm(values)


@lib.llama_log_callback
def _quiet(_level: int, _text: bytes, _user: object) -> None:
    pass


@pytest.mark.parametrize(("model", "pooling"), [("mean", "mean"), ("first", "first"), ("causal", "mean")])
def test_embeddings_are_pooled_as_the_model_says_or_to_the_mean(
    server: RunningServer, model: str, pooling: str
) -> None:
    path = server.cache_dir.parent / f"{model}.gguf"
    for text, vector in zip(TEXTS, vectors(server, TEXTS, model), strict=True):
        expected = reference(path, tokens(server, text, model), POOLINGS[pooling])
        assert np.array(vector) == pytest.approx(expected, abs=1e-3)


def test_an_input_is_embedded_among_others_as_it_is_alone(server: RunningServer) -> None:
    for model in ("mean", "causal", "recurrent"):
        together = vectors(server, TEXTS, model)
        assert [vectors(server, text, model)[0] for text in TEXTS] == together
        assert len({tuple(vector) for vector in together}) == len(TEXTS)


def test_an_encoder_reads_in_both_directions(server: RunningServer) -> None:
    first, second = vectors(server, ["the cat sat", "the cat ran"], "first")
    assert first != second


def test_an_encoder_takes_inputs_as_long_as_its_positions_and_no_longer(server: RunningServer) -> None:
    assert embed(server, "rope " * 510, "mean")["usage"]["prompt_tokens"] == 512
    response = server.post("/v1/embeddings", model="mean", input="rope " * 511)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["n_ctx"]) == (400, "context_length_exceeded", 512)


@pytest.mark.parametrize("stream", [False, True])
def test_an_encoder_generates_nothing_and_says_so(server: RunningServer, stream: bool) -> None:
    bodies: dict[str, Json] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "the cat"}], "stream": stream},
        "/v1/completions": {"prompt": "the cat", "stream": stream},
        "/v1/cache/mean": {"cache_name": "cat", "prompt": "the cat sat"},
    }
    for path, body in bodies.items():
        response = server.post(path, model="mean", **body)
        assert response.status_code == 400
        assert "embeddings only" in response.json()["error"]["message"]
    assert len(vectors(server, "the cat", "mean")) == 1


def test_a_model_that_ranks_texts_makes_no_embeddings(server: RunningServer) -> None:
    response = server.post("/v1/embeddings", model="rank", input="the cat")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")


def test_the_memory_for_embeddings_is_taken_when_they_are_first_asked_for(tmp_path: Path) -> None:
    with running_server(tmp_path / "cache") as server:
        (worker,) = server.workers()
        server.chat("Hello.", model="smollm2")
        before = worker.memory_info().rss
        vectors(server, "Hello.", "smollm2")
        eventually(lambda: worker.memory_info().rss > before + (20 << 20), seconds=5)
