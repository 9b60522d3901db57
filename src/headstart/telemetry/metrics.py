"""Metrics in the Prometheus format. Where vLLM has the same thing, its name and meaning are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headstart.errors import HeadstartError
from headstart.protocol import StoreReport
from headstart.service.interface.answer import Result
from headstart.service.interface.observer import (
    Answered,
    Built,
    Evicted,
    Failure,
    Loaded,
    Observer,
    Restored,
)
from headstart.service.service import Service

__all__ = ["CONTENT_TYPE", "MetricsObserver"]

LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
RESTORE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
# vLLM's finish reason of an answer that ends with calls.
REASONS = {"tool_calls": "stop"}
# vLLM's names for the sources of prompt tokens.
COMPUTED, CACHED = "local_compute", "local_cache_hit"


class MetricsObserver(Observer):
    """Counts events in a registry of its own. Every metric about a model has the label `model_name`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._prompt = self._counter("vllm:prompt_tokens", "Prompt tokens, cached ones included.")
        self._cached = self._counter("vllm:prompt_tokens_cached", "Prompt tokens that were not evaluated.")
        self._by_source = self._counter(
            "vllm:prompt_tokens_by_source", "Prompt tokens by source: evaluated, or from a state.", "source"
        )
        self._generated = self._counter("vllm:generation_tokens", "Generated tokens.")
        self._queries = self._counter(
            "vllm:prefix_cache_queries", "Prompt tokens that states were sought for."
        )
        self._hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens that came from states.")
        self._ended = self._counter(
            "vllm:request_success", "Answers by what ended them; abort: the client left.", "finished_reason"
        )
        self._first = self._histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.")
        self._gap = self._histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of an answer.", TOKEN_BUCKETS
        )
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the answer's end.")
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Waiting for a slot.")
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "Evaluating the prompt.")
        self._decode = self._histogram("vllm:request_decode_time_seconds", "Generating the answer.")
        self._cache_hits = self._counter(
            "headstart_cache_hits", "Requests that started from a state, by where it lay.", "tier"
        )
        self._misses = self._counter(
            "headstart_cache_misses",
            "Requests that missed the cache that they named, or that started from no state: no_match.",
            "reason",
        )
        self._saved = self._counter("headstart_tokens_saved", "Prompt tokens that states saved evaluating.")
        self._seconds_saved = self._counter(
            "headstart_seconds_saved", "Estimated time that states saved, less restoring them."
        )
        self._restores = self._histogram(
            "headstart_restore_seconds", "Restoring a state from a file.", RESTORE_BUCKETS
        )
        self._builds = self._histogram("headstart_build_seconds", "Building a cache.")
        self._failed_builds = self._counter("headstart_build_failures", "Builds that failed.")
        self._loads = self._histogram("headstart_model_load_seconds", "Loading a model.")
        self._evictions = self._counter("headstart_evictions", "Evicted caches by origin.", "origin")
        self._freed = self._counter("headstart_evicted_bytes", "Bytes that evictions freed.")
        # Evaluated prompt tokens and the milliseconds they took, by model.
        self._evaluated: dict[str, tuple[int, float]] = {}

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = LATENCY_BUCKETS) -> Histogram:
        return Histogram(name, text, ("model_name",), buckets=buckets, registry=self.registry)

    def watch(self, service: Service) -> None:
        """Adds what is read from the service when the metrics are requested."""
        self.registry.register(ServiceCollector(service))

    def exposition(self) -> bytes:
        """All metrics in the text format. Call it on the event loop, whose objects it reads."""
        return generate_latest(self.registry)

    def answered(self, event: Answered) -> None:
        model, result, stats = event.model, event.result, event.result.stats
        self._prompt.labels(model).inc(stats.prompt_tokens)
        self._cached.labels(model).inc(stats.cached_tokens)
        self._by_source.labels(model, COMPUTED).inc(stats.evaluated_tokens)
        self._by_source.labels(model, CACHED).inc(stats.cached_tokens)
        self._generated.labels(model).inc(result.n_tokens)
        self._queries.labels(model).inc(stats.prompt_tokens)
        self._hits.labels(model).inc(stats.cached_tokens)
        for reason in event.reasons:
            self._ended.labels(model, REASONS.get(reason, reason)).inc()
        self._first.labels(model).observe(event.first_token_seconds)
        gaps = self._gap.labels(model)
        for gap in event.token_gaps:
            gaps.observe(gap)
        self._whole.labels(model).observe(event.seconds)
        self._queue.labels(model).observe(stats.queue_ms / 1000)
        self._prefill.labels(model).observe(stats.prefill_ms / 1000)
        self._decode.labels(model).observe(stats.decode_ms / 1000)
        self._count_reuse(model, result)

    def _count_reuse(self, model: str, result: Result) -> None:
        stats = result.stats
        if stats.source != "none":
            self._cache_hits.labels(model, stats.source).inc()
        if result.miss or stats.source == "none":
            self._misses.labels(model, result.miss or "no_match").inc()
        self._saved.labels(model).inc(stats.cached_tokens)
        tokens, milliseconds = self._evaluated.get(model, (0, 0.0))
        tokens, milliseconds = tokens + stats.evaluated_tokens, milliseconds + stats.prefill_ms
        self._evaluated[model] = tokens, milliseconds
        saved = stats.cached_tokens * milliseconds / max(tokens, 1) - stats.restore_ms
        self._seconds_saved.labels(model).inc(max(saved, 0.0) / 1000)

    def built(self, event: Built) -> None:
        self._builds.labels(event.entry.model).observe(event.seconds)

    def evicted(self, event: Evicted) -> None:
        self._evictions.labels(event.entry.model, event.entry.origin).inc()
        self._freed.labels(event.entry.model).inc(event.freed)

    def loaded(self, event: Loaded) -> None:
        self._loads.labels(event.model).observe(event.seconds)

    def restored(self, event: Restored) -> None:
        self._restores.labels(event.model).observe(event.stats.restore_ms / 1000)

    def failed(self, event: Failure) -> None:
        match event.work:
            case "answer":
                reason = "error" if isinstance(event.error, HeadstartError) else "abort"
                self._ended.labels(event.model, reason).inc()
            case "build":
                self._failed_builds.labels(event.model).inc()
            case "load":
                pass


class ServiceCollector(Collector):
    """Reads the current state of a service when the metrics are requested."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        running = _gauge("vllm:num_requests_running", "Requests that the engine evaluates.")
        waiting = _gauge("vllm:num_requests_waiting", "Requests that wait for a slot.")
        usage = _gauge(
            "vllm:kv_cache_usage_perc", "Part of the slots' room that running requests take, 0 to 1."
        )
        loaded = _gauge("headstart_model_loaded", "1 if the model answers at once, else 0.")
        restarts = _counted("headstart_worker_restarts", "Workers started in place of one that died.")
        for name, model in self.service.models.all.items():
            load = model.engine.load()
            running.add_metric([name], load.running)
            waiting.add_metric([name], load.waiting)
            usage.add_metric([name], load.kv_usage)
            loaded.add_metric([name], model.engine.state == "ready")
            restarts.add_metric([name], model.engine.n_restarts)
        store = GaugeMetricFamily(
            "headstart_store_bytes", "Bytes of cache files.", labels=["model_name", "tier"]
        )
        for name, size in self.service.caches.sizes().items():
            store.add_metric([name, "disk"], size)
        yield from _state_metrics(self.service.caches.reports())
        failures = CounterMetricFamily("headstart_verify_failures", "States whose check failed.")
        failures.add_metric([], self.service.caches.n_corrupt)
        yield from (running, waiting, usage, loaded, restarts, store, failures)


def _state_metrics(reports: Mapping[str, StoreReport]) -> Iterator[Metric]:
    """Metrics of the models' state stores."""
    held = GaugeMetricFamily(
        "headstart_state_bytes",
        "Bytes of states kept for later requests without a name.",
        labels=["model_name", "tier"],
    )
    parking = _counted("headstart_state_park_seconds", "Copying states out of slots.")
    evictions = _counted("headstart_state_evictions", "States given up to make room.")
    failures = _counted("headstart_state_verify_failures", "Damaged blocks of states.")
    for name, report in reports.items():
        held.add_metric([name, "memory"], report.memory_bytes)
        held.add_metric([name, "disk"], report.disk_bytes)
        parking.add_metric([name], report.park_ms / 1000)
        evictions.add_metric([name], report.evictions)
        failures.add_metric([name], report.verify_failures)
    yield from (held, parking, evictions, failures)


def _gauge(name: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=["model_name"])


def _counted(name: str, text: str) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, labels=["model_name"])
