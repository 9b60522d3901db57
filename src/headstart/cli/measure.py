"""Measures requests with and without a cache, at the client."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

from headstart.cli.client import Client, Json, RequestFailed, cache_path
from headstart.cli.examples import Example

ANSWER_TOKENS = 48


@dataclass(frozen=True)
class MeasuredRun:
    """One streamed answer. Milliseconds are from sending the request to the first text, or to the end of an
    answer without any, and to the end. `usage` and `timings` are the server's account."""

    text: str
    ttft_ms: float
    total_ms: float
    usage: Json
    timings: Json

    @property
    def cached_tokens(self) -> int:
        return int(self.usage["prompt_tokens_details"]["cached_tokens"])


@dataclass(frozen=True)
class Comparison:
    """The same request several times, with and without a cache."""

    example: Example
    cache: Json
    with_cache: list[MeasuredRun] = field(default_factory=list)
    without: list[MeasuredRun] = field(default_factory=list)

    @property
    def same_answers(self) -> bool:
        return len({run.text for run in (*self.with_cache, *self.without)}) == 1

    def medians(self, measure: Callable[[MeasuredRun], float]) -> tuple[float, float]:
        """The medians without the cache, and with it."""
        return median(map(measure, self.without)), median(map(measure, self.with_cache))


class BenchRun:
    """Compares on one model of a server, the first unless one is named. The caches it makes have names
    that begin with `prefix`, and are deleted at the end. All methods raise RequestFailed."""

    def __init__(self, client: Client, model: str | None = None, prefix: str = "") -> None:
        served = client.model(model)
        self.client = client
        self.model = str(served["id"])
        self.slots = int(served["slots"])
        self.prefix = prefix
        self._caches: dict[str, Json] = {}

    def __enter__(self) -> BenchRun:
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._caches:
            with suppress(RequestFailed):
                self.client.call("DELETE", cache_path(self.model, name), "cache.deleted")

    def compare(self, example: Example, repetitions: int) -> Comparison:
        """Every run with the cache loads it from its file, if no other client uses the server."""
        cache = self._cache(example)
        comparison = Comparison(example, cache)
        for _ in range(repetitions):
            in_full = example.new.in_full(example.prefix) | {"cache_prompt": False}
            comparison.without.append(self._run(example.new.path, in_full))
            self.fill_slots()
            after = example.new.after(cache["cache_name"])
            comparison.with_cache.append(self._run(example.new.path, after))
        return comparison

    def _cache(self, example: Example) -> Json:
        name = self.prefix + example.cache_name
        if name not in self._caches:
            body = {"cache_name": name, "prompt": example.prefix}
            *_, self._caches[name] = self.client.events(cache_path(self.model), body)
        return self._caches[name]

    def fill_slots(self) -> None:
        """Fills all slots, so that the state comes from its file and not from a slot."""
        for _ in range(self.slots):
            self._run("/v1/completions", {"prompt": "1, 2, 3,", "cache_prompt": False, "max_tokens": 1})

    def _run(self, path: str, body: Json) -> MeasuredRun:
        return timed(self.client, path, {"model": self.model, "max_tokens": ANSWER_TOKENS, **body})


def timed(client: Client, path: str, body: Json) -> MeasuredRun:
    """One greedy answer, streamed. Raises RequestFailed."""
    request = {"temperature": 0, **body, "stream_options": {"include_usage": True}}
    pieces: list[str] = []
    account: Json = {}
    ttft_ms = 0.0
    started = perf_counter()
    for chunk in client.events(path, request):
        if (piece := _text(chunk)) and not pieces:
            ttft_ms = 1000 * (perf_counter() - started)
        pieces += [piece] if piece else []
        account |= {key: chunk[key] for key in ("usage", "timings") if chunk.get(key)}
    total_ms = 1000 * (perf_counter() - started)
    return MeasuredRun("".join(pieces), ttft_ms or total_ms, total_ms, account["usage"], account["timings"])


def _text(chunk: Json) -> str:
    if not chunk["choices"]:
        return ""
    choice = chunk["choices"][0]
    return str((choice["delta"].get("content") if "delta" in choice else choice["text"]) or "")
