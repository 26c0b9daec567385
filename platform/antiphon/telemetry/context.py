"""Trace context as plain strings, so that it travels in any message (request speed). Must not know: who carries it.

The string is a W3C ``traceparent``: "00-<trace id, 32 hex>-<parent span id, 16 hex>-<flags, 2 hex>".
"""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_W3C = TraceContextTextMapPropagator()
_KEY = "traceparent"


def traceparent_of(span: Span) -> str | None:
    """The context that makes others children of ``span``; None when it belongs to no trace (tracing is off)."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, trace.set_span_in_context(span, Context()))
    return carrier.get(_KEY)


def current_traceparent() -> str | None:
    """The context of the span this task is in, or None."""
    return traceparent_of(trace.get_current_span())


def context_of(traceparent: str | None) -> Context:
    """The parent context to start a span in; empty (a new trace) if ``traceparent`` is absent or malformed."""
    return _W3C.extract({} if traceparent is None else {_KEY: traceparent}, Context())


def is_valid(traceparent: str | None) -> bool:
    """True when ``traceparent`` names a trace and a parent span."""
    return trace.get_current_span(context_of(traceparent)).get_span_context().is_valid
