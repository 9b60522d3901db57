"""Spans: what they say against what responses said, whose children they are, and that they hold no text."""

from __future__ import annotations

import asyncio
import gzip
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from conftest import StartServer
from headstart.api.app import create_app
from headstart.config.settings import Settings
from headstart.errors import StartupError
from headstart.service.generation.answering import Answering
from headstart.service.service import Service
from headstart.telemetry.otlp import tracing_observer
from headstart.telemetry.tracing import TracingObserver
from own_workers import own_workers
from servers import Json

MARKS = ("pomegranate", "quicksilver", "marzipan", "SECRET-KEY-7151")
PROMPT = f"You keep the lighthouse, eat {MARKS[0]} and answer in few words. " * 6
QUESTION = f"Who brought the {MARKS[1]}?"
CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PHASES = ["prepare", "queue", "restore", "prefill", "decode"]


class Traced:
    """A server in this process and its spans."""

    def __init__(self, service: Service, http: httpx.AsyncClient, exporter: InMemorySpanExporter) -> None:
        self.service, self.http, self.exporter = service, http, exporter

    def spans(self, named: str = "") -> list[ReadableSpan]:
        """The spans that have ended, in this order: all, or those of one name or operation."""
        spans = self.exporter.get_finished_spans()
        return [span for span in spans if not named or span.name.split(" ")[0] == named]

    def only(self, named: str) -> ReadableSpan:
        (span,) = self.spans(named)
        return span

    def children(self, of: ReadableSpan) -> dict[str, ReadableSpan]:
        found = [span for span in self.spans() if span.parent and span.parent.span_id == id_of(of)]
        return {span.name: span for span in found}

    async def ask(self, path: str = CHAT, headers: dict[str, str] | None = None, **more: Any) -> Json:
        given: Json = {"prompt": QUESTION} if path == TEXT else {}
        if path == CHAT:
            given = {"messages": [{"role": "user", "content": QUESTION}]}
        body = {"model": "toy", "max_tokens": 5, **given, **more}
        response = await self.http.post(path, json=body, headers=headers)
        assert response.status_code == 200, response.text
        return {} if more.get("stream") else response.json()


def id_of(span: ReadableSpan) -> int:
    assert span.context
    return span.context.span_id


def told(span: ReadableSpan) -> Json:
    """The attributes, with lists as in JSON."""
    return json.loads(json.dumps(dict(span.attributes or {})))


@asynccontextmanager
async def running(directory: Path, model: str = "toy:eos=0", **settings: Any) -> AsyncIterator[Traced]:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = TracingObserver(provider)
    models = settings.pop("models", {"toy": model})
    chosen = Settings(models=models, cache_dir=directory, tune=False, **settings)
    service = Service(chosen, observers=[tracing])
    app = create_app(service)
    tracing.watch(app)
    try:
        await service.load()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            yield Traced(service, http, exporter)
    finally:
        await service.close()
        tracing.close()


@pytest.fixture
async def traced(tmp_path: Path) -> AsyncIterator[Traced]:
    async with running(tmp_path, aliases={"keeper": "toy@sea"}) as traced:
        yield traced


async def test_a_chats_span_says_what_its_response_said(traced: Traced) -> None:
    parameters: Json = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "n": 2, "stop": [MARKS[2]]}
    headers = {"x-request-id": "request-1"}
    answer = await traced.ask(headers=headers, **parameters)
    span = traced.only("chat")
    assert (span.name, span.kind, span.parent) == ("chat toy", SpanKind.SERVER, None)
    assert span.status.status_code is StatusCode.UNSET
    usage = answer["usage"]
    assert told(span) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "headstart",
        "gen_ai.request.model": "toy",
        "gen_ai.response.model": "toy",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 40,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.seed": 7,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": [choice["finish_reason"] for choice in answer["choices"]],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "headstart.evaluated_tokens": usage["prompt_tokens"],
        "headstart.cache.source": "none",
        "headstart.cache.matched_tokens": 0,
        "headstart.request.id": "request-1",
    }


async def test_a_hit_and_a_miss_say_so(traced: Traced) -> None:
    created = await traced.http.post("/v1/cache/toy", json={"cache_name": "sea", "prompt": PROMPT})
    assert created.status_code == 200
    hit = await traced.ask(model="keeper")
    missed = await traced.ask(use_cache="sea", cache_prompt=False)
    assert (hit["usage"]["cache_hit"], missed["usage"]["cache_hit"]) == (True, False)
    first, second = (told(span) for span in traced.spans("chat"))
    cached = hit["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert first["gen_ai.request.model"] == "keeper"
    assert first["gen_ai.response.model"] == "toy"
    assert first["gen_ai.usage.cache_read.input_tokens"] == cached > 100
    assert first["headstart.evaluated_tokens"] == hit["usage"]["prompt_tokens"] - cached
    assert first["headstart.cache.hit"] is True
    assert first["headstart.cache.names"] == ["sea"]
    assert first["headstart.cache.source"] in ("slot", "file")
    assert second["headstart.cache.hit"] is False
    assert second["headstart.cache.miss_reason"] == "cache_prompt_false"
    assert second["headstart.evaluated_tokens"] == missed["usage"]["prompt_tokens"]


async def test_phases_are_children_one_after_the_other_and_as_long_as_timings_say(traced: Traced) -> None:
    await traced.http.post("/v1/cache/toy", json={"cache_name": "sea", "prompt": PROMPT})
    for _ in range(traced.service.model("toy").info.slots):
        await traced.ask(cache_prompt=False)
    traced.exporter.clear()
    answer = await traced.ask(use_cache="sea")
    span = traced.only("chat")
    phases = traced.children(span)
    assert list(phases) == PHASES
    bounds = [time for each in phases.values() for time in (each.start_time, each.end_time)]
    times = [time or 0 for time in (span.start_time, *bounds, span.end_time)]
    assert times == sorted(times)
    assert phases["decode"].end_time
    assert phases["decode"].start_time
    seconds = (phases["decode"].end_time - phases["decode"].start_time) / 1e9
    assert seconds == pytest.approx(answer["timings"]["predicted_ms"] / 1000, abs=0.02)


async def test_a_completion_of_several_prompts_is_one_span(traced: Traced) -> None:
    answer = await traced.ask(TEXT, prompt=["One.", "Two and three.", "Four."])
    span = traced.only("text_completion")
    assert told(span)["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert told(span)["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"]
    reasons = [choice["finish_reason"] for choice in answer["choices"]]
    assert told(span)["gen_ai.response.finish_reasons"] == reasons
    assert len(traced.spans("prefill")) == 3


async def test_embeddings_have_a_span(traced: Traced) -> None:
    answer = await traced.ask("/v1/embeddings", input=[QUESTION, "Nobody."], headers={"traceparent": CLIENT})
    span = traced.only("embeddings")
    assert (span.name, span.kind) == ("embeddings toy", SpanKind.SERVER)
    assert told(span)["gen_ai.operation.name"] == "embeddings"
    assert told(span)["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert span.parent
    assert format(span.parent.span_id, "016x") == CLIENT.split("-")[2]
    assert span.status.status_code is StatusCode.UNSET


async def test_every_dialect_that_generates_has_spans(traced: Traced) -> None:
    await traced.ask("/v1/responses", input=QUESTION, max_tokens=None, max_output_tokens=16)
    await traced.ask("/v1/messages", messages=[{"role": "user", "content": QUESTION}])
    assert [span.name for span in traced.spans("chat")] == ["chat toy", "chat toy"]


async def test_a_streams_span_ends_with_it(traced: Traced) -> None:
    await traced.ask(stream=True)
    span = traced.only("chat")
    assert told(span)["gen_ai.request.stream"] is True
    assert told(span)["gen_ai.usage.output_tokens"] == 5


async def test_requests_that_do_not_generate_have_none(traced: Traced) -> None:
    traced.exporter.clear()
    await traced.http.get("/v1/models")
    await traced.http.post(CHAT, json={"model": "none", "messages": []})
    assert traced.spans() == []


async def test_concurrent_requests_are_children_of_their_own_clients(traced: Traced) -> None:
    clients = [f"00-{number:032x}-{number:016x}-01" for number in range(1, 9)]

    async def ask(number: int) -> None:
        headers = {"traceparent": clients[number - 1], "x-request-id": str(number)}
        await traced.ask(headers=headers, stream=bool(number % 2))

    await asyncio.gather(*(ask(number) for number in range(1, 9)))
    spans = traced.spans("chat")
    assert len(spans) == 8
    for span in spans:
        number = int(told(span)["headstart.request.id"])
        assert span.context
        assert span.parent
        assert (span.context.trace_id, span.parent.span_id, span.parent.is_remote) == (number, number, True)
        for phase in traced.children(span).values():
            assert phase.context
            assert phase.context.trace_id == number
        assert set(traced.children(span)) >= {"prepare", "prefill", "decode"}


async def test_a_client_decides_whether_its_request_is_sampled(traced: Traced) -> None:
    traced.exporter.clear()
    await traced.ask(headers={"traceparent": CLIENT[:-2] + "00"})
    assert traced.spans() == []


@pytest.mark.parametrize(
    "header",
    ["", "x", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", CLIENT.upper(), "ff" + CLIENT[2:], CLIENT * 99],
)
async def test_an_invalid_traceparent_is_ignored(traced: Traced, header: str) -> None:
    await traced.ask(headers={"traceparent": header, "tracestate": "=,a=b=,;" * 99})
    assert traced.only("chat").parent is None


def kill_workers() -> None:
    for worker in own_workers():
        worker.kill()


async def test_a_request_that_fails_in_the_engine_is_an_error(tmp_path: Path) -> None:
    async with running(tmp_path, "toy:ms_per_token=5,eos=0") as traced:
        asking = asyncio.ensure_future(traced.http.post(CHAT, json=_long_chat()))
        await eventually(lambda: traced.service.model("toy").engine.n_requests > 0)
        kill_workers()
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_died")
        span = traced.only("chat")
        assert (span.status.status_code, told(span)["error.type"]) == (StatusCode.ERROR, "engine_died")
        assert span.status.description is None
        assert list(span.events) == []
        assert "gen_ai.usage.output_tokens" not in told(span)


async def test_a_build_that_fails_is_an_error(tmp_path: Path) -> None:
    async with running(tmp_path, "toy:ms_per_token=5") as traced:
        body = {"cache_name": "sea", "prompt": PROMPT}
        building = asyncio.ensure_future(traced.http.post("/v1/cache/toy", json=body))
        await eventually(lambda: traced.service.model("toy").engine.n_requests > 0)
        kill_workers()
        assert (await building).status_code == 503
        build = traced.only("build")
        assert (build.status.status_code, told(build)["error.type"]) == (StatusCode.ERROR, "engine_died")


async def test_a_fault_of_the_server_is_an_error_without_its_message(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(MARKS[0])

    monkeypatch.setattr(Answering, "add", broken)
    body = _long_chat() | {"max_tokens": 5}
    assert (await traced.http.post(CHAT, json=body)).status_code == 500
    span = traced.only("chat")
    assert (span.status.status_code, told(span)["error.type"]) == (StatusCode.ERROR, "_OTHER")
    assert MARKS[0] not in span.to_json()


async def test_a_request_whose_client_leaves_is_cancelled_and_no_fault_of_the_server(tmp_path: Path) -> None:
    async with running(tmp_path, "toy:ms_per_token=5,eos=0") as traced:
        asking = asyncio.ensure_future(traced.http.post(CHAT, json=_long_chat()))
        await eventually(lambda: traced.service.model("toy").engine.n_requests > 0)
        asking.cancel()
        # The server cancels the answer, and says so to nobody.
        assert (await asking).status_code == 503
        span = traced.only("chat")
        assert (span.status.status_code, told(span)["error.type"]) == (StatusCode.UNSET, "cancelled")


def _long_chat() -> Json:
    return {"model": "toy", "max_tokens": 2000, "messages": [{"role": "user", "content": QUESTION}]}


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


async def test_a_build_is_a_span_of_the_client_that_asked_for_it(traced: Traced) -> None:
    body = {"cache_name": "sea", "prompt": PROMPT}
    await traced.http.post("/v1/cache/toy", json=body, headers={"traceparent": CLIENT})
    build = traced.only("build")
    entry = traced.service.caches.look_up(traced.service.model("toy"), "sea", param="name")
    assert told(build) == {
        "headstart.model": "toy",
        "headstart.cache.name": "sea",
        "headstart.cache.origin": "client",
        "headstart.cache.tokens": entry.n_tokens,
        "headstart.cache.bytes": entry.size_bytes,
        "headstart.evaluated_tokens": sum(form.n_tokens for form in entry.forms.values()),
    }
    assert build.parent
    assert format(build.parent.span_id, "016x") == CLIENT.split("-")[2]


async def test_loads_are_spans(tmp_path: Path) -> None:
    models = {"toy": "toy:", "other": "toy:", "gone": str(tmp_path / "none.gguf")}
    async with running(tmp_path, models=models) as traced:
        await traced.ask(model="other", headers={"traceparent": CLIENT})
        first, other = traced.spans("load")
        assert (first.parent, told(first)) == (None, {"headstart.model": "toy"})
        assert other.parent
        assert format(other.parent.trace_id, "032x") == CLIENT.split("-")[1]
        assert other.start_time
        assert other.end_time
        assert other.end_time - other.start_time > 1e6


async def test_a_load_that_fails_is_an_error(tmp_path: Path) -> None:
    async with running(tmp_path, models={"toy": "toy:", "gone": str(tmp_path / "none.gguf")}) as traced:
        assert (await traced.http.post(CHAT, json=_long_chat() | {"model": "gone"})).status_code == 503
        await eventually(lambda: len(traced.spans("load")) == 2)
        load = traced.spans("load")[-1]
        assert load.status.status_code is StatusCode.ERROR
        assert told(load) == {"headstart.model": "gone", "error.type": "unavailable"}


async def test_a_build_that_a_request_causes_is_its_child(traced: Traced) -> None:
    for _ in range(3):
        await traced.ask(
            messages=[{"role": "system", "content": PROMPT}, {"role": "user", "content": QUESTION}]
        )
    await eventually(lambda: bool(traced.spans("build")))
    build = traced.only("build")
    assert told(build)["headstart.cache.origin"] == "automatic"
    assert build.parent
    assert build.parent.span_id == id_of(traced.spans("chat")[-1])


@pytest.mark.slow
async def test_spans_hold_no_text_and_no_key(tmp_path: Path) -> None:
    keys = {"team": {"key": MARKS[3], "admin": True}}
    async with running(tmp_path, "toy:ms_per_token=1,eos=0", keys=keys) as traced:
        headers = {"authorization": f"Bearer {MARKS[3]}", "traceparent": CLIENT}
        traced.http.headers.update(headers)
        await traced.http.post("/v1/cache/toy", json={"cache_name": "sea", "prompt": PROMPT})
        tool = {"type": "function", "function": {"name": "fetch", "description": MARKS[2], "parameters": {}}}
        await traced.ask(use_cache="sea", stop=[MARKS[2]])
        await traced.ask(tools=[tool], user=MARKS[2], metadata={"about": MARKS[2]})
        await traced.ask(stream=True)
        await traced.ask(TEXT, prompt=PROMPT, stop=MARKS[2])
        await traced.ask("/v1/embeddings", input=QUESTION)
        await traced.ask("/v1/messages", messages=[{"role": "user", "content": QUESTION}], system=PROMPT)
        asked: Json = {"instructions": MARKS[2], "max_tokens": None, "max_output_tokens": 16}
        await traced.ask("/v1/responses", input=QUESTION, **asked)
        await traced.http.post(CHAT, json=_long_chat() | {"max_tokens": 1, "stop": "x", "bogus": MARKS[2]})
        refused: Json = {"use_cache": "sea", "response_format": {"type": MARKS[2]}}
        assert (await traced.http.post(CHAT, json=_long_chat() | refused)).status_code == 400
        asking = asyncio.ensure_future(traced.http.post(CHAT, json=_long_chat()))
        await eventually(lambda: traced.service.model("toy").engine.n_requests > 0)
        kill_workers()
        assert (await asking).status_code == 503
        spans = traced.spans()
        assert len(traced.spans("chat")) == 7
        text = "\n".join(span.to_json() for span in spans)
        assert [mark for mark in MARKS if mark.lower() in text.lower()] == []
        assert all(told(span)["headstart.key.name"] == "team" for span in traced.spans("chat"))


OFF = """
import asyncio, sys, tempfile
from pathlib import Path
import httpx
import fastapi, fastapi.telemetry

# FastAPI needs a part of it.
before = set(sys.modules)
import headstart.cli.serve
from headstart.api.app import create_app
from headstart.config.settings import Settings
from headstart.service.generation.answering import Answering
from headstart.service.service import Service

async def main(directory):
    service = Service(Settings(models={"toy": "toy:"}, cache_dir=Path(directory), tune=False))
    await service.load()
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        body = {"model": "toy", "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]}
        print((await http.post("/v1/chat/completions", json=body)).status_code)
    await service.close()

with tempfile.TemporaryDirectory() as directory:
    asyncio.run(main(directory))
more = set(sys.modules) - before
print([name for name in more if "opentelemetry" in name], "headstart.telemetry.tracing" in more)
"""


@pytest.mark.slow
def test_nothing_of_it_is_imported_where_it_is_off() -> None:
    done = subprocess.run([sys.executable, "-c", OFF], capture_output=True, text=True, check=True)
    assert done.stdout == "200\n[] False\n"


def test_a_start_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(StartupError, match=r"pip install 'headstart\[otel\]'"):
        tracing_observer()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(StartupError, match=r"pip install 'headstart\[otel\]'"):
        tracing_observer()


def test_what_the_environment_asks_for_is_done_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    observer = tracing_observer()
    assert observer.provider.resource.attributes["service.name"] == "headstart"
    observer.close()
    monkeypatch.setenv("OTEL_SERVICE_NAME", "lighthouse")
    observer = tracing_observer()
    assert observer.provider.resource.attributes["service.name"] == "lighthouse"
    observer.close()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(StartupError, match="zipkin"):
        tracing_observer()


def test_a_server_exports_its_spans_until_it_stops(start_server: StartServer) -> None:
    env = {"HEADSTART_TRACING": "true", "OTEL_TRACES_EXPORTER": "console", "OTEL_SERVICE_NAME": "lighthouse"}
    server = start_server("--model", "toy=toy:", env=env)
    response = server.http.post(CHAT, json=_long_chat() | {"max_tokens": 3}, headers={"traceparent": CLIENT})
    assert response.status_code == 200
    server.stop()
    printed = server.log.read_text()
    assert '"name": "chat toy"' in printed
    assert '"service.name": "lighthouse"' in printed
    assert CLIENT.split("-")[1] in printed
    assert MARKS[1] not in printed


class Collector(BaseHTTPRequestHandler):
    """Keeps what it was sent, with its path."""

    received: ClassVar[list[tuple[str, bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        plain = gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body
        self.received.append((self.path, plain))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def collector() -> Iterator[str]:
    """Its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    Collector.received.clear()
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_spans_are_sent_to_a_collector_when_the_server_stops(
    collector: str, start_server: StartServer
) -> None:
    env = {"HEADSTART_TRACING": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": collector}
    server = start_server("--model", "toy=toy:", env=env)
    assert server.post(CHAT, **_long_chat() | {"max_tokens": 3}).status_code == 200
    server.stop()
    assert {path for path, _ in Collector.received} == {"/v1/traces"}
    sent = b"".join(body for _, body in Collector.received)
    assert b"chat toy" in sent
    assert b"gen_ai.usage.input_tokens" in sent
    assert MARKS[1].encode() not in sent


def test_a_protocol_other_than_http_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(StartupError, match="grpc"):
        tracing_observer()
