"""OpenTelemetry spans of requests, builds and loads, made of the server's events. Imported only where tracing
is on."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from threading import Thread
from time import monotonic_ns, time_ns

from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from headstart import __version__
from headstart.protocol import Stats
from headstart.service.interface.observer import (
    Answered,
    Built,
    Failure,
    InputsEmbedded,
    Loaded,
    Observer,
    Submitted,
)
from headstart.telemetry.span_attributes import (
    OPERATIONS,
    Attributes,
    error_type,
    is_servers,
    of_answers,
    of_submitted,
)

CLOSE_SECONDS = 3.0
# A request may have thousands of prompts; the phases of the first ones are spans.
MOST_PROMPTS = 16


class Clock:
    """Nanoseconds since 1970, never going back: spans that one clock measured lie within each other."""

    def __init__(self) -> None:
        self._offset = time_ns() - monotonic_ns()

    def now(self) -> int:
        return self._offset + monotonic_ns()


class RequestTrace:
    """An HTTP request. `parent`: the context of the client's span, if it sent one. `span`: the request's own,
    once it was submitted to the engine."""

    def __init__(self, scope: Scope) -> None:
        self.clock = Clock()
        self.began = self.clock.now()
        self.submitted = self.began
        self.parent = _client_context(scope)
        self.scope = scope
        self.span: Span | None = None
        self.answers: list[Answered] = []
        self.has_ended = False
        self.error: BaseException | None = None

    @property
    def context(self) -> Context:
        """The parent of work done for the request."""
        return self.parent if self.span is None else set_span_in_context(self.span, self.parent)

    @property
    def state(self) -> dict[str, object]:
        """Notes of middleware and routes about the request."""
        found: dict[str, object] = self.scope.get("state", {})
        return found

    def end(self) -> None:
        """Call when the response was sent. Lets go of the request, since tasks that outlive it have its
        context."""
        if self.span:
            self.span.set_attributes(self._last_attributes())
            if self.error or not self.has_ended:
                _fail(self.span, self.error)
            self.span.end(self.clock.now())
        self.scope, self.answers = {}, []

    def _last_attributes(self) -> Attributes:
        found = of_answers(self.answers) if self.answers else {}
        if request_id := self.state.get("request_id"):
            found["headstart.request.id"] = str(request_id)
        if self.state.get("streamed"):
            found["gen_ai.request.stream"] = True
        return found


_current: ContextVar[RequestTrace | None] = ContextVar("request_trace", default=None)


class TracedRequests:
    """The middleware that sees a request first. A request's span lasts from its headers to the end of the
    response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trace = RequestTrace(scope)
        token = _current.set(trace)
        try:
            await self.app(scope, receive, send)
        finally:
            _current.reset(token)
            trace.end()


class TracingObserver(Observer):
    """Makes spans of events. Those of requests need `watch`."""

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self.tracer = provider.get_tracer("headstart", __version__)
        self.clock = Clock()

    def watch(self, app: Starlette) -> None:
        """Call after all other middleware was added."""
        app.add_middleware(TracedRequests)

    def close(self) -> None:
        """Exports what is left, if the collector takes it within CLOSE_SECONDS."""
        closing = Thread(target=self.provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)

    def submitted(self, event: Submitted) -> None:
        if (trace := _current.get()) is None:
            return
        trace.submitted = trace.clock.now()
        if trace.span is None:
            trace.span = self._request_span(trace, event)
            self._phase(trace, "prepare", trace.began, trace.submitted)

    def _request_span(self, trace: RequestTrace, event: Submitted) -> Span:
        model = str(trace.state.get("requested_model", event.model))
        return self.tracer.start_span(
            f"{OPERATIONS[event.form]} {model}",
            context=trace.parent,
            kind=SpanKind.SERVER,
            attributes=of_submitted(event, model) | _address(trace.scope),
            start_time=trace.began,
        )

    def answered(self, event: Answered) -> None:
        if (trace := _current.get()) is None:
            return
        trace.has_ended = True
        trace.answers.append(event)
        if len(trace.answers) <= MOST_PROMPTS:
            now = trace.clock.now()
            for name, begin, end in _phases(event.result.stats, trace.submitted):
                self._phase(trace, name, min(begin, now), min(end, now))

    def embedded(self, event: InputsEmbedded) -> None:
        if (trace := _current.get()) and trace.span:
            trace.has_ended = True
            trace.span.set_attribute("gen_ai.usage.input_tokens", event.prompt_tokens)

    def built(self, event: Built) -> None:
        entry = event.entry
        attributes: Attributes = {
            "headstart.model": entry.model,
            "headstart.cache.name": entry.name,
            "headstart.cache.origin": entry.origin,
            "headstart.cache.tokens": entry.n_tokens,
            "headstart.cache.bytes": entry.size_bytes,
            "headstart.evaluated_tokens": sum(form.evaluated_tokens for form in event.stats.values()),
        }
        self._work("build", attributes, event.seconds)

    def loaded(self, event: Loaded) -> None:
        self._work("load", {"headstart.model": event.model}, event.seconds)

    def failed(self, event: Failure) -> None:
        match event.work:
            case "answer" | "embed":
                if trace := _current.get():
                    trace.error = event.error
            case "build":
                names: Attributes = {"headstart.model": event.model, "headstart.cache.name": event.cache}
                self._work("build", names, error=event.error)
            case "load":
                self._work("load", {"headstart.model": event.model}, error=event.error)

    def _phase(self, trace: RequestTrace, name: str, begin: int, end: int) -> None:
        self.tracer.start_span(name, context=trace.context, start_time=begin).end(end)

    def _work(
        self, name: str, attributes: Attributes, seconds: float = 0.0, error: BaseException | None = None
    ) -> None:
        """A span that ends now. Its parent is the request that caused the work, if one did."""
        trace, now = _current.get(), self.clock.now()
        context = trace.context if trace else Context()
        begun = now - int(seconds * 1e9)
        span = self.tracer.start_span(name, context=context, attributes=attributes, start_time=begun)
        if error:
            _fail(span, error)
        span.end(now)


def _client_context(scope: Scope) -> Context:
    """The context that a valid `traceparent` names, else an empty one."""
    names = (b"traceparent", b"tracestate")
    given = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in names}
    return TraceContextTextMapPropagator().extract(given, context=Context())


def _address(scope: Scope) -> Attributes:
    host, port = scope.get("server") or ("", None)
    return {"server.address": host, "server.port": port} if port is not None else {}


def _phases(stats: Stats, begin: int) -> Iterator[tuple[str, int, int]]:
    """Name, begin and end of each phase in the engine that took time."""
    phases = {
        "queue": stats.queue_ms,
        "restore": stats.restore_ms,
        "prefill": stats.prefill_ms,
        "decode": stats.decode_ms,
    }
    for name, milliseconds in phases.items():
        end = begin + int(milliseconds * 1e6)
        if end > begin:
            yield name, begin, end
        begin = end


def _fail(span: Span, error: BaseException | None) -> None:
    span.set_attribute("error.type", error_type(error))
    if is_servers(error):
        span.set_status(Status(StatusCode.ERROR))
