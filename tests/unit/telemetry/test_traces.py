"""Traces: what a real OTLP/gRPC collector receives, and that switched off they record nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from antiphon import telemetry
from antiphon.telemetry import semconv

VARIABLES = (
    "OTEL_SDK_DISABLED",
    "OTEL_TRACES_EXPORTER",
    "OTEL_METRICS_EXPORTER",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
    "OTEL_SERVICE_NAME",
    "OTEL_RESOURCE_ATTRIBUTES",
    "OTEL_TRACES_SAMPLER",
)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps what it gets."""

    def __init__(self) -> None:
        self.requests: list[trace_service_pb2.ExportTraceServiceRequest] = []
        self._lock = threading.Lock()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._lock:
            self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    @property
    def spans(self) -> dict[str, Span]:
        return {
            span.name: span
            for request in self.requests
            for resource_spans in request.resource_spans
            for scope_spans in resource_spans.scope_spans
            for span in scope_spans.spans
        }

    @property
    def resource(self) -> dict[str, str]:
        return {a.key: a.value.string_value for a in self.requests[0].resource_spans[0].resource.attributes}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    collector = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    yield collector
    server.stop(None).wait()


def test_one_trace_spans_a_gateway_and_an_engine(collector: Collector) -> None:
    gateway, engine = telemetry.setup("gateway"), telemetry.setup("engine")
    root = gateway.tracer(__name__).start_span("chat m", kind=telemetry.SpanKind.SERVER)
    carried = telemetry.traceparent_of(root)
    now = time.monotonic()
    decode = engine.record_span("decode", traceparent=carried, start_s=now - 2.0, end_s=now - 0.5)
    engine.record_span("step", traceparent=decode, start_s=now - 1.0, end_s=now - 0.9)
    root.end()
    engine.close()
    gateway.close()

    spans = collector.spans
    assert spans.keys() == {"chat m", "decode", "step"}
    assert len({span.trace_id for span in spans.values()}) == 1
    assert spans["chat m"].parent_span_id == b""
    assert spans["decode"].parent_span_id == spans["chat m"].span_id
    assert spans["step"].parent_span_id == spans["decode"].span_id


def test_a_span_recorded_afterwards_has_the_times_of_the_monotonic_clock(collector: Collector) -> None:
    with telemetry.setup("engine") as engine:
        root = engine.tracer(__name__).start_span("root")
        now, wall_ns = time.monotonic(), time.time_ns()
        engine.record_span("queue", traceparent=telemetry.traceparent_of(root), start_s=now - 3.0, end_s=now - 1.0)
        root.end()
    span = collector.spans["queue"]
    assert span.end_time_unix_nano - span.start_time_unix_nano == pytest.approx(2e9, abs=1e3)
    assert span.start_time_unix_nano == pytest.approx(wall_ns - 3e9, abs=0.5e9)


def test_a_span_that_ends_before_it_begins_gets_no_negative_duration(collector: Collector) -> None:
    with telemetry.setup("engine") as engine:
        root = engine.tracer(__name__).start_span("root")
        engine.record_span("odd", traceparent=telemetry.traceparent_of(root), start_s=10.0, end_s=9.0)
        root.end()
    span = collector.spans["odd"]
    assert span.end_time_unix_nano == span.start_time_unix_nano


def test_attributes_and_errors_travel_with_a_recorded_span(collector: Collector) -> None:
    with telemetry.setup("engine") as engine:
        root = engine.tracer(__name__).start_span("root")
        engine.record_span(
            semconv.SPAN_PREFILL,
            traceparent=telemetry.traceparent_of(root),
            start_s=1.0,
            end_s=2.0,
            attributes={semconv.USAGE_INPUT_TOKENS: 7},
            error="deadline_exceeded",
        )
        root.end()
    span = collector.spans["prefill"]
    assert {a.key: a.value.int_value for a in span.attributes} == {"gen_ai.usage.input_tokens": 7}
    assert span.status.message == "deadline_exceeded"


def test_what_has_no_parent_is_not_recorded_afterwards(collector: Collector) -> None:
    with telemetry.setup("engine") as engine:
        for traceparent in (None, "", "garbage", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"):
            assert engine.record_span("orphan", traceparent=traceparent, start_s=1.0, end_s=2.0) is None
    assert collector.requests == []


def test_a_callers_decision_not_to_sample_holds_downstream(collector: Collector) -> None:
    with telemetry.setup("engine") as engine:
        engine.record_span("quiet", traceparent=f"00-{'a' * 32}-{'b' * 16}-00", start_s=1.0, end_s=2.0)
    assert collector.requests == []


def test_the_standard_sampler_variable_is_honoured(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    with telemetry.setup("gateway") as gateway:
        gateway.tracer(__name__).start_span("root").end()
    assert collector.requests == []


def test_the_environment_names_the_service_over_our_default(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "from-outside")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=lab")
    with telemetry.setup("gateway", attributes={"service.instance.id": "a/b/0"}) as gateway:
        gateway.tracer(__name__).start_span("root").end()
    assert collector.resource["service.name"] == "from-outside"
    assert collector.resource["deployment.environment.name"] == "lab"
    assert collector.resource["service.instance.id"] == "a/b/0"


def test_our_default_names_the_service_when_the_environment_does_not(collector: Collector) -> None:
    with telemetry.setup("gateway") as gateway:
        gateway.tracer(__name__).start_span("root").end()
    assert collector.resource["service.name"] == "gateway"


def test_without_exporter_or_endpoint_spans_go_nowhere() -> None:
    with telemetry.setup("gateway") as gateway:
        span = gateway.tracer(__name__).start_span("root")
        assert not gateway.tracing
        assert not span.is_recording()
        assert telemetry.traceparent_of(span) is None


def test_exporter_none_wins_over_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    with telemetry.setup("gateway") as gateway:
        assert not gateway.tracing


def test_an_unknown_exporter_is_warned_about_and_ignored(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with telemetry.setup("gateway") as gateway:
        assert not gateway.tracing
    assert "OTEL_TRACES_EXPORTER: unknown exporter 'zipkin'" in caplog.text


def test_the_console_exporter_prints_spans(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    with telemetry.setup("gateway") as gateway:
        gateway.tracer(__name__).start_span("seen").end()
    assert '"name": "seen"' in capsys.readouterr().out


def test_disabled_telemetry_starts_no_thread_and_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    before = threading.active_count()
    with telemetry.setup("gateway") as off:
        off.meter(__name__).create_counter("n").add(1)
        off.alias("n", "vllm:n")
        parent = f"00-{'a' * 32}-{'b' * 16}-01"
        assert off.record_span("x", traceparent=parent, start_s=1.0, end_s=2.0) is None
        assert off.prometheus_text() == b""
        assert threading.active_count() == before


def test_closing_twice_is_closing_once(collector: Collector) -> None:
    gateway = telemetry.setup("gateway")
    gateway.close()
    num_threads = threading.active_count()
    gateway.close()
    assert threading.active_count() == num_threads


def test_closing_does_not_wait_for_a_collector_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    gateway = telemetry.setup("gateway")
    gateway.tracer(__name__).start_span("lost").end()
    started = time.monotonic()
    gateway.close(timeout_s=0.2)
    assert time.monotonic() - started < 5.0


def test_the_current_span_gives_the_traceparent(collector: Collector) -> None:
    assert telemetry.current_traceparent() is None
    with telemetry.setup("gateway") as gateway, gateway.tracer(__name__).start_as_current_span("root") as span:
        assert telemetry.current_traceparent() == telemetry.traceparent_of(span)
        assert telemetry.context_of(telemetry.current_traceparent())
