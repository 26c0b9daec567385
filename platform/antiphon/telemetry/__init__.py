"""Traces, metrics and structured logs of every process; the only door to opentelemetry (request speed).

    telemetry = setup("antiphon-gateway")      once per process, by its composition root
    telemetry.tracer(__name__)                 spans while they happen
    telemetry.record_span(...)                 spans after the fact, from monotonic clocks
    telemetry.meter(__name__)                  instruments; telemetry.prometheus_text() renders them
    configure_logging("info")                  JSON lines, or readable ones on a terminal

Names of the semantic conventions are in ``telemetry.semconv``. Must not know: requests, engines or what is measured.
"""

from opentelemetry.metrics import CallbackOptions, Counter, Histogram, Meter, Observation, UpDownCounter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from antiphon.telemetry.context import context_of, current_traceparent, traceparent_of
from antiphon.telemetry.logs import configure_logging, log_context
from antiphon.telemetry.sdk import CONTENT_TYPE, Telemetry, disabled, setup

__all__ = [
    "CONTENT_TYPE",
    "CallbackOptions",
    "Counter",
    "Histogram",
    "Meter",
    "Observation",
    "Span",
    "SpanKind",
    "Status",
    "StatusCode",
    "Telemetry",
    "Tracer",
    "UpDownCounter",
    "configure_logging",
    "context_of",
    "current_traceparent",
    "disabled",
    "log_context",
    "setup",
    "traceparent_of",
]
