"""Embeddings: their shapes, what they are worth, and that nobody is the worse for others' asking for them."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from time import monotonic

import httpx
import numpy as np
import pytest
from openai import OpenAI

from conftest import StartServer
from embedding_requests import embed, tokens, vectors
from headstart.engine.core.chunking import Chunking
from headstart.engine.core.embeddings import Embeddings
from headstart.engine.model import ModelError, TooLarge
from headstart.engine.toy import ToyEmbedder, ToyModel
from headstart.protocol import Embed, Embedded, EngineSettings, Failed, RequestEvent, Vector
from headstart.toyspec import N_VOCAB
from servers import Json, RunningServer, events, eventually, running_server

SIZE = 16
TEXTS = ["The tide comes in at night.", "x", "Ropes are counted on Mondays. " * 30, "Æsop — 漁港 🐟"]


def unpacked(text: str) -> list[float]:
    data = base64.b64decode(text)
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def test_an_embedding_has_the_shape_that_openais_have(toy: RunningServer) -> None:
    answer = embed(toy, TEXTS[0])
    (item,) = answer["data"]
    n_tokens = len(tokens(toy, TEXTS[0]))
    assert answer["object"] == "list"
    assert answer["model"] == "toy"
    assert answer["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    assert (item["object"], item["index"], len(item["embedding"])) == ("embedding", 0, SIZE)
    assert math.hypot(*item["embedding"]) == pytest.approx(1, abs=1e-6)


def test_a_list_is_answered_in_its_order(toy: RunningServer) -> None:
    answer = embed(toy, TEXTS)
    assert [item["index"] for item in answer["data"]] == [0, 1, 2, 3]
    assert [item["embedding"] for item in answer["data"]] == [vectors(toy, text)[0] for text in TEXTS]
    assert answer["usage"]["prompt_tokens"] == sum(len(tokens(toy, text)) for text in TEXTS)


def test_different_texts_have_different_embeddings(toy: RunningServer) -> None:
    assert len({tuple(vector) for vector in vectors(toy, TEXTS)}) == len(TEXTS)


def test_tokens_are_embedded_as_their_text_is(toy: RunningServer) -> None:
    of_texts = vectors(toy, TEXTS)
    as_tokens = [tokens(toy, text) for text in TEXTS]
    assert vectors(toy, as_tokens) == of_texts
    assert vectors(toy, as_tokens[0]) == of_texts[:1]
    assert vectors(toy, [as_tokens[0], TEXTS[1]]) == of_texts[:2]


def test_base64_has_the_same_numbers(toy: RunningServer) -> None:
    (item,) = embed(toy, TEXTS[0], encoding_format="base64")["data"]
    assert unpacked(item["embedding"]) == vectors(toy, TEXTS[0])[0]


def test_the_openai_client_gets_the_same_numbers_in_either_encoding(toy: RunningServer) -> None:
    with OpenAI(base_url=f"{toy.url}/v1", api_key="none", max_retries=0) as client:
        by_default = client.embeddings.create(model="toy", input=TEXTS, user="harbour", dimensions=SIZE)
        as_floats = client.embeddings.create(model="toy", input=TEXTS, encoding_format="float")
    assert [item.embedding for item in by_default.data] == vectors(toy, TEXTS)
    assert [item.embedding for item in as_floats.data] == vectors(toy, TEXTS)
    assert by_default.usage.total_tokens == as_floats.usage.prompt_tokens > 0


def test_as_many_inputs_as_openai_takes_are_taken(toy: RunningServer) -> None:
    texts = [f"rope {number}" for number in range(2048)]
    found = vectors(toy, texts)
    assert len(found) == 2048
    assert found[7::500] == vectors(toy, texts[7::500])


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "input", "required"),
        ({"input": None}, "input", "a text, a list of texts"),
        ({"input": 7}, "input", "a text, a list of texts"),
        ({"input": {"text": "x"}}, "input", "a text, a list of texts"),
        ({"input": ""}, "input", "Input 0 is empty"),
        ({"input": []}, "input", "0 inputs"),
        ({"input": [[]]}, "input", "Input 0 is empty"),
        ({"input": ["x", ""]}, "input", "Input 1 is empty"),
        ({"input": ["x", [1, "y"]]}, "input", "a text, a list of texts"),
        ({"input": [1, "y"]}, "input", "a text, a list of texts"),
        ({"input": [1.5]}, "input", "a text, a list of texts"),
        ({"input": [True]}, "input", "a text, a list of texts"),
        ({"input": ["x"] * 2049}, "input", "1 to 2048"),
        ({"input": [-1]}, "input", "no token -1"),
        ({"input": [[1], [N_VOCAB, 1]]}, "input", f"no token {N_VOCAB}"),
        ({"input": [10**30]}, "input", "no token"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format", "float"),
        ({"input": "x", "dimensions": 8}, "dimensions", "16 dimensions"),
        ({"input": "x", "dimensions": "many"}, "dimensions", "integer"),
    ],
)
def test_what_cannot_be_embedded_is_refused_with_a_reason(
    toy: RunningServer, body: Json, param: str, said: str
) -> None:
    response = toy.post("/v1/embeddings", model="toy", **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert said in error["message"]


def test_half_a_surrogate_pair_is_refused(toy: RunningServer) -> None:
    for given in (rb'"\ud800"', rb'["x", "\ud800"]'):
        response = toy.http.post("/v1/embeddings", content=b'{"model": "toy", "input": ' + given + b"}")
        assert (response.status_code, response.json()["error"]["param"]) == (400, "input")


def test_an_input_may_fill_the_context_but_not_pass_it(toy: RunningServer) -> None:
    n_ctx = 4096
    assert len(vectors(toy, [[65] * n_ctx])[0]) == SIZE
    response = toy.post("/v1/embeddings", model="toy", input=["x", "a" * n_ctx])
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input")
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (n_ctx + 1, n_ctx)


def test_a_model_that_is_not_there_is_404(toy: RunningServer) -> None:
    response = toy.post("/v1/embeddings", model="nobody", input="x")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_embeddings_need_a_key_where_there_are_keys(start_server: StartServer, tmp_path: Path) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text('[keys.harbour]\nkey = "sesame"\n')
    server = start_server("--model", "toy=toy:", "--config", str(config))
    for path in ("/v1/embeddings", "/tokenize", "/detokenize", "/apply-template"):
        assert server.post(path, model="toy", input="x").status_code == 401
    server.http.headers["authorization"] = "Bearer sesame"
    assert len(vectors(server, "x")) == 1


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("slow") / "cache"
    with running_server(directory, "--model", "toy=toy:ms_per_token=2,eos=0") as server:
        yield server


def _streamed(server: RunningServer) -> tuple[str, float]:
    """What a chat says, and the longest wait for its next token in seconds."""
    body: Json = {"model": "toy", "messages": [{"role": "user", "content": "Go on."}], "stream": True}
    body |= {"temperature": 0, "max_tokens": 20, "cache_prompt": False}
    text, times = "", []
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        for event in events(response):
            if said := event["choices"][0]["delta"].get("content"):
                text += said
                times.append(monotonic())
    return text, max(later - earlier for earlier, later in pairwise(times))


@pytest.mark.slow
def test_a_stream_says_the_same_and_goes_on_while_others_embed(slow: RunningServer) -> None:
    alone, _ = _streamed(slow)
    # Of 4 s for the long input, the stream may wait for one chunk at a time: 64 tokens of 2 ms.
    given = ["a" * 2000, *(f"rope {number}" for number in range(20))]
    with ThreadPoolExecutor() as pool:
        embedding = pool.submit(vectors, slow, given)
        beside, longest = _streamed(slow)
        assert not embedding.done()
        assert len(embedding.result()) == len(given)
    assert beside == alone
    assert longest < 1


@pytest.mark.slow
def test_requests_take_turns(slow: RunningServer) -> None:
    with ThreadPoolExecutor() as pool:
        long = pool.submit(vectors, slow, [f"rope number {number}" for number in range(100)])
        eventually(long.running)
        started = monotonic()
        vectors(slow, ["x", "y"])
        assert not long.done()
        assert monotonic() - started < 2
        long.result()


def test_the_work_ends_when_the_client_leaves(slow: RunningServer) -> None:
    with pytest.raises(httpx.ReadTimeout):
        # It would take 80 s.
        slow.http.post(
            "/v1/embeddings",
            json={"model": "toy", "input": [[65] * 4000] * 10},
            timeout=httpx.Timeout(5, read=0.5),
        )
    started = monotonic()
    vectors(slow, "x")
    assert monotonic() - started < 5


def test_the_end_of_the_worker_is_a_clean_error(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=2")
    (worker,) = server.workers()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(server.post, "/v1/embeddings", model="toy", input=[[65] * 4000] * 10)
        # An idle worker waits for its socket alone; one that computes wakes at each token.
        idle = worker.num_ctx_switches().voluntary
        eventually(lambda: worker.num_ctx_switches().voluntary > idle + 20)
        worker.kill()
        response = asked.result()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_died")
    eventually(lambda: server.http.get("/ready").status_code == 200)
    assert len(vectors(server, "x")) == 1


class Embedder(ToyEmbedder):
    """There is no embedding of a token 9, and none is evaluated of a token 8."""

    def evaluate(self, start: int, tokens: Seq[int]) -> None:
        if 8 in tokens:
            raise ModelError("it has an 8")
        super().evaluate(start, tokens)

    def vector(self) -> bytes:
        if 9 in self.history:
            raise ModelError("it has a 9")
        return super().vector()


class Model(ToyModel):
    """Has memory for embeddings at the second time only."""

    asked = 0

    def embedder(self) -> ToyEmbedder:
        self.asked += 1
        if self.asked == 1:
            raise TooLarge("there is too little memory")
        return Embedder(0)


def ends(engine: Embeddings) -> list[tuple[int, str]]:
    """How each request ends, with the number of events it had."""
    told: list[RequestEvent] = []
    while engine.busy:
        told += engine.step()
    return [
        (event.id, event.kind if isinstance(event, Failed) else f"{sum(e.id == event.id for e in told)}")
        for event in told
        if isinstance(event, Failed | Embedded)
    ]


def test_a_request_that_fails_ends_once_and_leaves_the_others_alone() -> None:
    engine = Embeddings(Model(EngineSettings("toy:", 1, 256)), Chunking(4))
    engine.add(Embed(1, [[1]]))
    assert ends(engine) == [(1, "memory")]
    long = list(range(10, 30))
    for request in (Embed(2, [[1], [9], [2]]), Embed(3, [[1], long]), Embed(4, [[*long, 8]])):
        engine.add(request)
    assert sorted(ends(engine)) == [(2, "engine"), (3, "3"), (4, "engine")]


def test_what_a_cancelled_request_had_begun_is_no_part_of_the_next() -> None:
    engine = Embeddings(Model(EngineSettings("toy:", 1, 256)), Chunking(4))
    engine.model.embedder = lambda: Embedder(0)  # type: ignore[method-assign]
    engine.add(Embed(1, [list(range(10, 30))]))
    engine.step()
    assert engine.jobs[0].computed == 4
    assert list(engine.cancel(1)) == [Embedded(1)]
    assert list(engine.cancel(1)) == []
    engine.add(Embed(2, [[1, 2]]))
    (vector, end) = engine.step()
    assert end == Embedded(2)
    alone = Embedder(0)
    alone.evaluate(0, [1, 2])
    assert isinstance(vector, Vector)
    assert vector.values == alone.vector()


@pytest.mark.real_model
def test_alike_texts_are_closer_than_others(real: RunningServer) -> None:
    texts = [
        "A cat sleeps on the sofa.",
        "The kitten is napping on the couch.",
        "Interest rates rose in March.",
    ]
    cat, kitten, rates = np.array(vectors(real, texts, "smollm2"))
    assert cat @ kitten > max(cat @ rates, kitten @ rates) + 0.02


@pytest.mark.real_model
def test_an_embedding_is_the_same_whatever_batch_it_comes_in(real: RunningServer) -> None:
    rules = [f"Rule {number}: the pilot counts the ropes." for number in range(8)]
    texts = [text[:300] for text in TEXTS] + rules
    together = vectors(real, texts, "smollm2")
    apart = [vectors(real, text, "smollm2")[0] for text in texts]
    assert together == apart
    assert len(together[0]) == 576


@pytest.mark.real_model
def test_chats_say_the_same_while_others_embed(real: RunningServer) -> None:
    def said() -> str:
        answer = real.chat("Name three fish.", model="smollm2", cache_prompt=False, max_tokens=40)
        return str(answer["choices"][0]["message"]["content"])

    alone = said()
    with ThreadPoolExecutor() as pool:
        embedding = pool.submit(vectors, real, ["The tide comes in at night. " * 12] * 4, "smollm2")
        assert said() == alone
        embedding.result()
