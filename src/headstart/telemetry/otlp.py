"""The way of spans out of the server: OTLP over HTTP, configured by OpenTelemetry's own environment
variables. OpenTelemetry is an extra, imported only where tracing is on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from headstart import __version__
from headstart.errors import StartupError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

    from headstart.telemetry.tracing import TracingObserver


def tracing_observer() -> TracingObserver:
    """Exports in a thread of its own. Raises StartupError if the extra isn't installed or the environment
    asks for another exporter."""
    try:
        from headstart.telemetry.tracing import TracingObserver

        return TracingObserver(_provider())
    except ImportError as error:
        raise StartupError(
            f"Tracing needs OpenTelemetry: pip install 'headstart[otel]', or turn it off ({error})."
        ) from error


def _provider() -> TracerProvider:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # Given attributes would replace those that the environment gives.
    about = {"service.name": "headstart", "service.version": __version__}
    resource = Resource.create({**about, **OTELResourceDetector().detect().attributes})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(_exporter()))
    return provider


def _exporter() -> SpanExporter:
    if (kind := os.environ.get("OTEL_TRACES_EXPORTER") or "otlp") == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if kind != "otlp":
        raise StartupError(f"OTEL_TRACES_EXPORTER is {kind!r}: it may be otlp or console.")
    if (protocol := _protocol()) != "http/protobuf":
        raise StartupError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}: only http/protobuf is supported.")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    exporter: SpanExporter = OTLPSpanExporter()
    return exporter


def _protocol() -> str:
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    return next((value for name in names if (value := os.environ.get(name))), "http/protobuf")
