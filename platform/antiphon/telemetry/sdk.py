"""One process's tracer and meter providers, made as the standard OTEL_* variables ask (request speed).

    OTEL_SDK_DISABLED=true                 nothing is recorded, /metrics is empty
    OTEL_TRACES_EXPORTER                   otlp, console, none; default: otlp if an endpoint is set, otherwise off
    OTEL_METRICS_EXPORTER                  the same, in addition to the Prometheus text, which is always there
    OTEL_EXPORTER_OTLP_[TRACES_|METRICS_]ENDPOINT, _HEADERS, _TIMEOUT, _INSECURE, OTEL_TRACES_SAMPLER[_ARG], OTEL_BSP_*,
    OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_METRIC_EXPORT_INTERVAL: read by the SDK itself

A value that isn't known is warned about and ignored, as the specification asks: telemetry never keeps a server from
serving. Global providers stay untouched, since libraries of the same process (Ray) have their own.

Must not know: what is recorded.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from opentelemetry.metrics import Meter, MeterProvider, NoOpMeterProvider
from opentelemetry.trace import NoOpTracerProvider, SpanKind, Status, StatusCode, Tracer, TracerProvider
from opentelemetry.util.types import AttributeValue

from antiphon.telemetry.context import context_of, is_valid, traceparent_of

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor

    from antiphon.telemetry.prometheus import PrometheusText

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # of prometheus_text

Attributes = Mapping[str, AttributeValue]


class _Stoppable(Protocol):
    def shutdown(self) -> object: ...


class Telemetry:
    """Tracers, meters and the Prometheus text of one process. Any thread may use it; its maker closes it."""

    def __init__(
        self,
        *,
        tracers: TracerProvider,
        meters: MeterProvider,
        tracing: bool,
        prometheus: PrometheusText | None = None,
        providers: Sequence[_Stoppable] = (),
        exporters: Sequence[_Stoppable] = (),
    ) -> None:
        self._tracers = tracers
        self._meters = meters
        self._tracing = tracing
        self._prometheus = prometheus
        self._providers = providers
        self._exporters = exporters
        self._recorder = tracers.get_tracer("antiphon")
        self._closed = False

    @property
    def tracing(self) -> bool:
        """False when spans go nowhere; whoever would compute attributes for them need not."""
        return self._tracing

    def tracer(self, name: str) -> Tracer:
        """The tracer of a module (``__name__``)."""
        return self._tracers.get_tracer(name)

    def meter(self, name: str) -> Meter:
        """The meter of a module (``__name__``)."""
        return self._meters.get_meter(name)

    def alias(self, metric_name: str, alias: str, *, labels: Mapping[str, str] | None = None) -> None:
        """Show an instrument's samples in the Prometheus text under a second name, which may have colons.

        Args:
            metric_name: the instrument's name as given to the meter, e.g. "antiphon.requests.waiting".
            alias: the other name, e.g. "vllm:num_requests_waiting"; a counter's may end in "_total".
            labels: labels to rename under the alias (as rendered: dots are underscores), ours → theirs.

        Raises:
            InvalidInput: ``alias`` is no name for Prometheus.
        """
        from antiphon.telemetry.prometheus import Alias

        if self._prometheus is not None:
            self._prometheus.add_alias(metric_name, Alias(name=alias, labels=dict(labels or {})))

    def prometheus_text(self) -> bytes:
        """All metrics in Prometheus' text format (``CONTENT_TYPE``); empty when telemetry is off."""
        return b"" if self._prometheus is None else self._prometheus.render()

    def record_span(
        self,
        name: str,
        *,
        traceparent: str | None,
        start_s: float,
        end_s: float,
        attributes: Attributes | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        error: str | None = None,
    ) -> str | None:
        """Record a span after the fact.

        Args:
            name: name of the span.
            traceparent: its parent; None or a malformed one records nothing, since what has no parent was not traced.
            start_s: when it began, on ``time.monotonic``'s clock.
            end_s: when it ended, on the same clock; not before ``start_s``.
            attributes: its attributes.
            kind: its kind.
            error: why it failed; None = it did not.

        Returns:
            The span's own traceparent, to give it children; None when nothing was recorded.
        """
        if not self._tracing or not is_valid(traceparent):
            return None
        wall_ns = time.time_ns() - time.monotonic_ns()
        start_ns = wall_ns + int(start_s * 1e9)
        span = self._recorder.start_span(name, context_of(traceparent), kind, attributes, start_time=start_ns)
        if error is not None:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(max(start_ns, wall_ns + int(end_s * 1e9)))
        return traceparent_of(span)

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is pending, for at most about ``timeout_s``, and stop. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if not self._providers:
            return
        # A collector that does not answer would hold the SDK's own shutdown for minutes.
        stopping = threading.Thread(target=self._shutdown, name="telemetry-close", daemon=True)
        stopping.start()
        stopping.join(timeout_s)
        if stopping.is_alive():
            log.warning("telemetry still pending after %.1f s is dropped", timeout_s)
            for exporter in self._exporters:
                exporter.shutdown()
            stopping.join(1.0)

    def _shutdown(self) -> None:
        for provider in self._providers:
            provider.shutdown()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def disabled() -> Telemetry:
    """Telemetry that records nothing: for tests, and for those who were given none."""
    return Telemetry(tracers=NoOpTracerProvider(), meters=NoOpMeterProvider(), tracing=False)


def setup(service_name: str, *, attributes: Mapping[str, str | int] | None = None) -> Telemetry:
    """Make this process's telemetry as its environment asks.

    Args:
        service_name: service.name, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES say otherwise.
        attributes: further resource attributes, e.g. service.instance.id; OTEL_RESOURCE_ATTRIBUTES win over them.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return disabled()

    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from opentelemetry.sdk.metrics import MeterProvider as SdkMeterProvider
    from opentelemetry.sdk.trace import TracerProvider as SdkTracerProvider

    from antiphon.telemetry.prometheus import PrometheusText

    resource = _resource(service_name, attributes or {})
    exporters: list[_Stoppable] = []
    text = PrometheusText()
    readers: list[MetricReader] = [PrometheusMetricReader(registry=text.registry, scope_info_enabled=False)]
    readers += _metric_readers(exporters)
    meters = SdkMeterProvider(metric_readers=readers, resource=resource)

    processors = _span_processors(exporters)
    if not processors:
        no_tracers = NoOpTracerProvider()
        return Telemetry(tracers=no_tracers, meters=meters, tracing=False, prometheus=text, providers=[meters], exporters=exporters)
    tracers = SdkTracerProvider(resource=resource)
    for processor in processors:
        tracers.add_span_processor(processor)
    return Telemetry(
        tracers=tracers, meters=meters, tracing=True, prometheus=text, providers=[tracers, meters], exporters=exporters
    )


def _resource(service_name: str, attributes: Mapping[str, str | int]) -> Resource:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    from antiphon import __version__

    ours = {"service.name": service_name, "service.version": __version__, "service.namespace": "antiphon", **attributes}
    return Resource.create(ours).merge(OTELResourceDetector().detect())


def _chosen(signal: str) -> list[str]:
    """The exporters of "TRACES" or "METRICS", in the environment's words."""
    variable = f"OTEL_{signal}_EXPORTER"
    names = [name.strip().lower() for name in os.environ.get(variable, "").split(",") if name.strip()]
    if not names:
        endpoints = (f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
        names = ["otlp"] if any(os.environ.get(endpoint) for endpoint in endpoints) else []
    known = {"otlp", "console", "none"} | ({"prometheus"} if signal == "METRICS" else set())
    for name in names:
        if name not in known:
            log.warning("%s: unknown exporter %r is ignored; known: %s", variable, name, ", ".join(sorted(known)))
    protocol = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"))
    if "otlp" in names and protocol.strip() not in ("", "grpc"):
        log.warning("OTLP protocol %r is not available; grpc is used", protocol)
    return [name for name in names if name in ("otlp", "console")]


def _span_processors(exporters: list[_Stoppable]) -> list[SpanProcessor]:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor

    processors: list[SpanProcessor] = []
    for name in _chosen("TRACES"):
        if name == "console":
            processors.append(SimpleSpanProcessor(ConsoleSpanExporter(out=sys.stdout)))
        else:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
            exporters.append(exporter)
            processors.append(BatchSpanProcessor(exporter))
    return processors


def _metric_readers(exporters: list[_Stoppable]) -> list[MetricReader]:
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader

    readers: list[MetricReader] = []
    for name in _chosen("METRICS"):
        if name == "console":
            readers.append(PeriodicExportingMetricReader(ConsoleMetricExporter(out=sys.stdout)))
        else:
            from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

            exporter = OTLPMetricExporter()
            exporters.append(exporter)
            readers.append(PeriodicExportingMetricReader(exporter))
    return readers
