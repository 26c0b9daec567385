"""What users say is in no span of a whole deployment, gateway, prefill, attention and FFN, until a gateway is told to record it."""

from __future__ import annotations

import concurrent.futures
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from attack.conftest import Target, second_gateway
from attack.test_privacy import ASKED, CANARY

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps what it gets: the service's name, and each span as it came."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            names = {each.key: each.value.string_value for each in resource.resource.attributes}
            self.spans += [(names["service.name"], span) for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def telling(self, text: str) -> set[str]:
        """Services whose spans have it, anywhere in them."""
        return {service for service, span in tuple(self.spans) if text.encode() in span.SerializeToString()}


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Target, Collector]]:
    collector = Collector()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(CONTENT, raising=False)
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        patch.setenv("OTEL_EXPORTER_OTLP_INSECURE", "true")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        patch.setenv("OTEL_METRICS_EXPORTER", "none")
        target = Target(tmp_path_factory.mktemp("traced"))
        try:
            yield target, collector
        finally:
            target.close()
            server.stop(0)


def until(seen: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 30.0
    while not seen():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def services_of(collector: Collector, trace_id: str) -> set[str]:
    return {service for service, span in tuple(collector.spans) if span.trace_id.hex() == trace_id}


def ask(url: str, trace_id: str, content: str) -> str:
    """A chat whose prompt another worker computes; the answer's text."""
    body = {"model": "target", "messages": [{"role": "user", "content": content * 40}], "max_tokens": 6, "ignore_eos": True}
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, trust_env=False, timeout=60.0)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_a_canary_sings_in_no_span_until_it_may(traced: tuple[Target, Collector], monkeypatch: pytest.MonkeyPatch) -> None:
    target, collector = traced
    with httpx.Client(base_url=target.http, trust_env=False, timeout=60.0) as client:
        for path, bodies in ASKED.items():
            for body in bodies:
                if body.get("model") == CANARY:
                    continue  # a span has the name of the model that was asked for, whatever it is
                for more in ({}, {"stream": True}):
                    asked = {"model": "target", "max_tokens": 4, **body, **more}
                    assert client.post(path, json=asked).status_code in (200, 400, 404, 422)
    quiet = "0af7651916cd43dd8448eb211c80319c"
    said = ask(target.http, quiet, CANARY)
    everybody = {"antiphon-gateway", "antiphon-prefill", "antiphon-attention"}
    until(lambda: services_of(collector, quiet) >= everybody)
    errors = [span for service, span in collector.spans if any(each.key == "error.type" for each in span.attributes)]
    assert len(errors) > 10, "requests that failed have spans, too"
    assert collector.telling(CANARY) == set()
    assert len(said) > 3
    assert collector.telling(json.dumps(said)[1:-1]) == collector.telling(said) == set()

    monkeypatch.setenv(CONTENT, "true")
    loud = "1af7651916cd43dd8448eb211c80319c"
    with second_gateway(target) as bound:
        said = ask(f"http://127.0.0.1:{bound.http_port}", loud, f"again {CANARY}")  # nobody has it cached
        until(lambda: services_of(collector, loud) >= everybody)
    assert collector.telling(CANARY) == {"antiphon-gateway"}, "workers have tokens, and tell none of them"
    (span,) = [span for service, span in collector.spans if service == "antiphon-gateway" and span.trace_id.hex() == loud]
    told = {each.key: each.value.string_value for each in span.attributes}
    parts = [{"type": "text", "content": f"again {CANARY}" * 40}]
    assert json.loads(told["gen_ai.input.messages"]) == [{"role": "user", "parts": parts}]
    (answer,) = json.loads(told["gen_ai.output.messages"])
    assert answer == {"role": "assistant", "parts": [{"type": "text", "content": said}], "finish_reason": "length"}
