"""What a gateway shows of itself: metrics with vLLM's names, one span per request."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from antiphon.telemetry import Telemetry, setup

_spec = importlib.util.spec_from_file_location("doors_fake_engine", Path(__file__).with_name("fake_engine.py"))
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "what is it?"}], "max_tokens": 5, "seed": 1}


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[fake.World]:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    with setup("antiphon-gateway-test") as telemetry:
        async with fake.world(tmp_path, telemetry=telemetry) as made:
            yield made


async def metrics_of(world: fake.World) -> dict[tuple[str, str], float]:
    """Samples by name and by the label that matters here."""
    async with httpx.AsyncClient(base_url=world.url) as http:
        answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = sample.labels
            which = labels.get("finished_reason") or labels.get("error_type") or labels.get("antiphon_role") or ""
            found[sample.name, which] = sample.value
    return found


async def test_requests_tokens_and_times_are_counted_under_vllms_names(world: fake.World) -> None:
    async with httpx.AsyncClient(base_url=world.url) as http:
        for _ in range(3):
            assert (await http.post(CHAT, json=BODY)).status_code == 200
    found = await metrics_of(world)
    num_prompt = len(world.engine.requests[0].prompt_token_ids)
    assert found["vllm:prompt_tokens_total", ""] == 3 * num_prompt
    assert found["vllm:generation_tokens_total", ""] == 15
    assert found["vllm:request_success_total", "length"] == 3
    assert found["vllm:time_to_first_token_seconds_count", ""] == 3
    assert found["vllm:inter_token_latency_seconds_count", ""] == 12
    assert found["vllm:time_per_output_token_seconds_count", ""] == 12
    assert found["vllm:e2e_request_latency_seconds_count", ""] == 3
    assert found["vllm:request_queue_time_seconds_count", ""] == 3


async def test_workers_loads_are_shown_by_role(world: fake.World) -> None:
    load = world.workers[0].info.load
    changed = {"num_waiting": 3, "num_running": 2, "num_preemptions": 7, "num_prefix_hit_tokens": 5}
    await world.workers[0].register(load=fake.replace(load, **changed))
    async with asyncio.timeout(10):
        while (await metrics_of(world)).get(("vllm:num_requests_waiting", "monolith")) != 3:
            await asyncio.sleep(0.02)
    found = await metrics_of(world)
    assert found["vllm:num_requests_running", "monolith"] == 2
    assert found["vllm:kv_cache_usage_perc", "monolith"] == 0.25
    assert found["vllm:num_preemptions_total", "monolith"] == 7
    assert found["vllm:prefix_cache_hits_total", "monolith"] == 5
    assert found["antiphon_worker_requests_waiting", "monolith"] == 3


async def test_failures_are_counted_by_code_and_made_up_models_are_no_labels(world: fake.World) -> None:
    async with httpx.AsyncClient(base_url=world.url) as http:
        for index in range(3):
            await http.post(CHAT, json={**BODY, "model": f"made-up-{index}"})
        text = (await http.get("/metrics")).text
    assert "made-up" not in text
    assert (await metrics_of(world))["antiphon_requests_failed_total", "model_not_found"] == 3


async def test_each_request_is_one_span_and_its_context_reaches_the_engine(tmp_path: Path) -> None:
    spans = InMemorySpanExporter()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    telemetry = Telemetry(tracers=tracers, meters=MeterProvider(), tracing=True)
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    async with fake.world(tmp_path, telemetry=telemetry) as world, httpx.AsyncClient(base_url=world.url) as http:
        headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
        stops = ["a canary that no trace may hold"]
        assert (await http.post(CHAT, json={**BODY, "stop": stops}, headers=headers)).status_code == 200
        (request,) = world.engine.requests
        await http.post(CHAT, json={**BODY, "model": "nobody"})
    done, failed = spans.get_finished_spans()
    assert done.name == "chat tiny"
    assert "canary" not in done.to_json()
    assert f"{done.context.trace_id:032x}" == trace_id
    assert request.traceparent == f"00-{trace_id}-{done.context.span_id:016x}-01"
    attributes = done.attributes or {}
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.model"] == "tiny"
    assert attributes["gen_ai.request.max_tokens"] == 5
    assert attributes["gen_ai.usage.input_tokens"] == len(request.prompt_token_ids)
    assert attributes["gen_ai.usage.output_tokens"] == 5
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert attributes["antiphon.worker"] == ("demo/monolith/0",)
    assert (failed.attributes or {})["error.type"] == "model_not_found"


@pytest.mark.parametrize("wanted", [None, "true"])
async def test_what_is_said_stays_out_of_traces_and_logs_unless_traces_are_to_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wanted: str | None
) -> None:
    caplog.set_level(logging.DEBUG)
    if wanted is not None:
        monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", wanted)
    spans = InMemorySpanExporter()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    telemetry = Telemetry(tracers=tracers, meters=MeterProvider(), tracing=True)
    said = [{"role": "user", "content": "canary-of-a-prompt"}]
    async with fake.world(tmp_path, telemetry=telemetry) as world, httpx.AsyncClient(base_url=world.url) as http:
        answer = await http.post(CHAT, json={**BODY, "messages": said})
        text = answer.json()["choices"][0]["message"]["content"]
        assert len(text) > 3
        # Also where something fails: too long, wrong fields with it as their value, a template's own complaint.
        for wrong in (
            {"messages": [{"role": "user", "content": "canary-of-a-prompt " * 400}]},
            {"messages": [{"role": "canary-of-a-prompt", "content": "x"}]},
            {"messages": said, "temperature": "canary-of-a-prompt"},
            {"messages": said, "canary-of-a-prompt": 1, "response_format": {"type": "canary-of-a-prompt"}},
            {"messages": said, "stop": ["canary-of-a-prompt"] * 99},
        ):
            assert (await http.post(CHAT, json={**BODY, **wrong})).status_code == 400
        assert (await http.post(CHAT, content=b'{"canary-of-a-prompt')).status_code == 400
        streamed = {**BODY, "messages": said, "stream": True, "max_tokens": 100}
        async with http.stream("POST", CHAT, json=streamed) as stream:
            await anext(aiter(stream.aiter_lines()))
        async with asyncio.timeout(10):
            while len(spans.get_finished_spans()) < 3:
                await asyncio.sleep(0.01)
    logs = "\n".join(f"{record.getMessage()} {record.__dict__}" for record in caplog.records if record.name.startswith("antiphon"))
    traces = "\n".join(span.to_json() for span in spans.get_finished_spans())
    assert "canary" not in logs
    assert text not in logs
    if wanted is None:
        assert "canary" not in traces
        assert text not in traces
        return
    attributes = spans.get_finished_spans()[0].attributes or {}
    parts = [{"type": "text", "content": "canary-of-a-prompt"}]
    assert json.loads(str(attributes["gen_ai.input.messages"])) == [{"role": "user", "parts": parts}]
    assert json.loads(str(attributes["gen_ai.output.messages"])) == [
        {"role": "assistant", "parts": [{"type": "text", "content": text}], "finish_reason": "length"}
    ]


async def test_without_tracing_the_callers_context_still_reaches_the_engine(world: fake.World) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with httpx.AsyncClient(base_url=world.url) as http:
        await http.post(CHAT, json=BODY, headers={"traceparent": traceparent})
    assert world.engine.requests[0].traceparent == traceparent


async def test_what_a_door_refuses_is_counted_by_its_code(world: fake.World) -> None:
    async with httpx.AsyncClient(base_url=world.url) as http:
        for refused in ({**BODY, "temperature": 9}, {**BODY, "audio": {}}, {**BODY, "messages": []}):
            assert (await http.post(CHAT, json=refused)).status_code == 400
        assert (await http.post(CHAT, content=b"{")).status_code == 400
    found = await metrics_of(world)
    assert found["antiphon_requests_failed_total", "unsupported_parameter"] == 1
    async with httpx.AsyncClient(base_url=world.url) as http:
        text = (await http.get("/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("antiphon_requests_failed_total{")]
    assert sum(float(line.rpartition(" ")[2]) for line in lines) == 4


async def test_each_request_is_one_line_of_the_access_log_without_its_content(
    world: fake.World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="antiphon")
    body = {**BODY, "messages": [{"role": "user", "content": "a canary"}], "stop": ["a canary"]}
    async with httpx.AsyncClient(base_url=world.url) as http:
        assert (await http.post(CHAT, json=body)).status_code == 200
        assert (await http.get("/nowhere")).status_code == 404
    lines = [record for record in caplog.records if record.name == "antiphon.access"]
    assert [(record.message, record.status) for record in lines] == [(f"POST {CHAT}", 200), ("GET /nowhere", 404)]
    assert all(record.duration_s >= 0 and record.client == "127.0.0.1" for record in lines)
    assert "canary" not in "".join(str(record.__dict__) for record in caplog.records)
