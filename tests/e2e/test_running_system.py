"""A whole deployment of real processes, prefill + 2A2F, under what users and machines do to it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from antiphon.apps.serve.local import DirectDeployment
from antiphon.core.document.spec import LLMDeployment
from antiphon.testing import write_tiny_llama

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

NUM_BEGUN = 4  # streams that have a token when a worker is killed


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str, str]] = []  # (service, span name, trace id)

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.append((attributes["service.name"], span.name, span.trace_id.hex()))
        return trace_service_pb2.ExportTraceServiceResponse()


class System:
    def __init__(self, base: Path, collector: Collector, num_blocks: int = 256, **model: Any) -> None:
        self.collector = collector
        self.checkpoint = write_tiny_llama(base / "model")
        self.run_dir = base / "run"
        self.run_dir.mkdir()
        document = LLMDeployment.model_validate(
            {
                "apiVersion": "serving.antiphon.dev/v1alpha1",
                "kind": "LLMDeployment",
                "metadata": {"name": "tiny"},
                "spec": {
                    "model": {"uri": str(self.checkpoint), **model},
                    "topology": "pd-afd",
                    "pools": [
                        {"name": "prefill", "role": "prefill"},
                        {"name": "attention", "role": "attention", "replicas": 2},
                        {"name": "ffn", "role": "ffn", "replicas": 2},
                    ],
                    "cache": {"numBlocks": num_blocks},
                    "scheduler": {
                        "maxNumSeqs": 16,
                        "maxQueuedRequests": 24,
                        "maxNumBatchedTokens": 128,
                        "remotePrefillMinTokens": 16,
                    },
                    "endpoint": {"httpPort": 0, "grpcPort": 0},
                    "directory": {"leaseS": 1.5},
                },
            }
        )
        self.deployment = DirectDeployment(document, checkpoint=str(self.checkpoint), run_dir=self.run_dir)
        self.deployment.start()
        deadline = time.monotonic() + 90
        while not self.deployment.poll():
            assert time.monotonic() < deadline, "the deployment did not get ready"
            time.sleep(0.05)
        entries = [json.loads(line) for line in (self.run_dir / "journal.jsonl").read_text().splitlines()]
        (gateway,) = [e["facts"] for e in entries if e["kind"] == "ready" and e["subject"] == "gateway"]
        self.url = f"http://127.0.0.1:{gateway['http_port']}"
        self.grpc = f"127.0.0.1:{gateway['grpc_port']}"

        def all_seen() -> None:  # the gateway looks into the directory now and then: workers are ready before it knows
            assert sum(bool(worker.get("ready")) for worker in self.workers()) == 5

        eventually(all_seen)

    def workers(self) -> list[dict[str, Any]]:
        status = httpx.get(f"{self.url}/status", timeout=10).json()
        return [worker for deployment in [status] for worker in _workers_in(deployment)]

    def pid_of(self, pool: str, index: int = 0) -> int:
        entries = [json.loads(line) for line in (self.run_dir / "journal.jsonl").read_text().splitlines()]
        return [e["pid"] for e in entries if e["kind"] == "started" and e["subject"] == f"{pool}/{index}"][-1]

    def complete(self, prompt: str, **options: Any) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, **options}
        response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        response.raise_for_status()
        return response.json()

    def metric(self, name: str, **labels: str) -> list[float]:
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        return [
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.split("{")[0].split(" ")[0] == name and all(f'{k}="{v}"' in line for k, v in labels.items())
        ]


def _workers_in(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "worker_id" in value or "workerId" in value:
            yield value
        else:
            for child in value.values():
                yield from _workers_in(child)
    elif isinstance(value, list):
        for child in value:
            yield from _workers_in(child)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    collector = Collector()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    before = dict(os.environ)
    os.environ |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_EXPORTER_OTLP_INSECURE": "true",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "OTEL_METRICS_EXPORTER": "none",
    }
    try:
        running = System(tmp_path_factory.mktemp("system"), collector)
        try:
            yield running
        finally:
            running.deployment.close()
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop(0)


def eventually(check: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            check()
        except (AssertionError, httpx.HTTPError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def test_one_request_is_one_trace_over_gateway_prefill_and_attention(system: System) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    body = {"model": "tiny", "prompt": "a long enough prompt to be prefilled elsewhere " * 3, "max_tokens": 4}
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    assert httpx.post(f"{system.url}/v1/completions", json=body, headers=headers, timeout=30).status_code == 200

    def seen() -> None:
        services = {service for service, _, trace in system.collector.spans if trace == trace_id}
        assert {"antiphon-gateway", "antiphon-prefill", "antiphon-attention"} <= services, services
        names = {name for _, name, trace in system.collector.spans if trace == trace_id}
        assert {"queue", "prefill", "decode"} <= names, names

    eventually(seen)


def test_metrics_show_every_role_and_vllm_s_names(system: System) -> None:
    system.complete("count me")

    def seen() -> None:
        for role in ("prefill", "attention"):
            assert system.metric("vllm:kv_cache_usage_perc", role=role) or system.metric("vllm:kv_cache_usage_perc")
        assert system.metric("vllm:num_requests_running")
        assert system.metric("vllm:time_to_first_token_seconds_count")[0] > 0

    eventually(seen)


def test_a_soak_with_cancels_disconnects_and_missed_deadlines_leaves_nothing_behind(system: System) -> None:
    system.complete("warm up " * 10)
    processes = [psutil.Process(system.pid_of(pool, i)) for pool, i in (("prefill", 0), ("attention", 0), ("attention", 1))]
    chance = random.Random(11)

    async def one(client: httpx.AsyncClient, number: int) -> str:
        body = {
            "model": "tiny",
            "prompt": "x" * chance.randint(1, 400),
            "max_tokens": chance.randint(1, 120),
            "stream": chance.random() < 0.7,
            "temperature": chance.choice([0, 1]),
            "n": chance.choice([1, 1, 1, 2]),
            "ignore_eos": True,
        }
        fate = chance.random()
        headers = {"x-request-timeout-s": "0.05"} if fate < 0.15 else {}
        patience = chance.uniform(0.02, 0.4) if 0.15 <= fate < 0.5 else 60.0
        try:
            async with asyncio.timeout(patience):
                async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
                    async for _ in response.aiter_bytes():
                        pass
                    return str(response.status_code)
        except TimeoutError:
            return "gone"

    async def soak(num_requests: int) -> list[str]:
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=system.url, limits=limits, timeout=60) as client:
            gate = asyncio.Semaphore(30)

            async def gated(number: int) -> str:
                async with gate:
                    return await one(client, number)

            return await asyncio.gather(*(gated(number) for number in range(num_requests)))

    asyncio.run(soak(100))  # what the first requests make once, such as pages of the cache, is not what they leave behind
    before = [process.memory_info().rss for process in processes]
    outcomes = asyncio.run(soak(350))
    assert outcomes.count("200") > 100, {o: outcomes.count(o) for o in set(outcomes)}
    assert outcomes.count("gone") > 20
    assert set(outcomes) <= {"200", "429", "504", "gone"}, {o: outcomes.count(o) for o in set(outcomes)}

    def at_rest() -> None:
        for worker in system.workers():
            load = worker["load"]
            assert load.get("num_running", 0) == load.get("num_waiting", 0) == 0
            assert load.get("num_free_blocks", 0) == load.get("num_total_blocks", 0)

    eventually(at_rest, 30.0)
    for process, start in zip(processes, before, strict=True):
        assert process.memory_info().rss < start + 64 * 2**20
    assert system.complete("still here")["usage"]["completion_tokens"] == 24


def test_overload_is_refused_early_and_what_was_accepted_completes(system: System) -> None:
    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=system.url, timeout=120, limits=httpx.Limits(max_connections=900)) as client:
            body = {"model": "tiny", "prompt": "flood", "max_tokens": 16, "ignore_eos": True, "temperature": 0}
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(800)))

    responses = asyncio.run(flood())
    codes = {response.status_code for response in responses}
    assert codes == {200, 429}, codes
    accepted = [r.json() for r in responses if r.status_code == 200]
    assert len(accepted) >= 80
    assert {r["choices"][0]["text"] for r in accepted} == {accepted[0]["choices"][0]["text"]}
    assert all(r["usage"]["completion_tokens"] == 16 for r in accepted)
    for refused in (r for r in responses if r.status_code == 429):
        assert float(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["message"]


@pytest.fixture(scope="module")
def undisturbed(system: System) -> dict[str, str]:
    """What prompts are answered with, one by one, while nothing happens."""
    prompts = [f"stream number {n} " * (1 + n % 5) for n in range(16)]
    return {prompt: system.complete(prompt, max_tokens=120)["choices"][0]["text"] for prompt in prompts}


async def disturbed(system: System, prompts: list[str], disturb: Callable[[], None], timeout_s: float = 90.0) -> list[str]:
    """The texts of streams of all prompts; ``disturb`` is called once some have begun."""
    begun: set[str] = set()  # prompts that have a token
    some_begun = asyncio.Event()

    async def stream(client: httpx.AsyncClient, prompt: str) -> str:
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": 120,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        text = ""
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    text += event["choices"][0]["text"] if event["choices"] else ""
                    begun.add(prompt)
                    if len(begun) == NUM_BEGUN:
                        some_begun.set()
        return text

    async with httpx.AsyncClient(base_url=system.url, timeout=timeout_s) as client:
        tasks = [asyncio.create_task(stream(client, prompt)) for prompt in prompts]
        async with asyncio.timeout(60):
            await some_begun.wait()
        assert not all(task.done() for task in tasks)  # some are at their tokens, some at their prompts or in the queue
        disturb()
        return await asyncio.gather(*tasks)


@pytest.mark.parametrize(("pool", "index"), [("ffn", 0), ("attention", 0), ("prefill", 0), ("ffn", 1), ("attention", 1)])
def test_a_worker_killed_under_load_costs_no_stream_a_token(
    system: System, undisturbed: dict[str, str], pool: str, index: int
) -> None:
    pid = system.pid_of(pool, index)
    texts = asyncio.run(disturbed(system, list(undisturbed), lambda: os.kill(pid, signal.SIGKILL)))
    assert texts == list(undisturbed.values())

    def back() -> None:
        found = {worker["worker_id"]: worker for worker in system.workers()}
        assert f"tiny/{pool}/{index}" in found
        seen = found[f"tiny/{pool}/{index}"]
        assert seen["ready"], seen
        assert seen["pid"] == system.pid_of(pool, index) != pid  # no longer the lease of the lost one

    eventually(back, 60.0)


@pytest.mark.parametrize(("pool", "index"), [("ffn", 0), ("attention", 0), ("prefill", 0)])
def test_a_worker_stopped_under_load_holds_no_stream_up_and_comes_back_with_no_wrong_token(
    system: System, undisturbed: dict[str, str], pool: str, index: int
) -> None:
    """All streams end while it is stopped, sooner than any timeout of seconds would have it; then its late answers come."""
    pid = system.pid_of(pool, index)
    try:
        texts = asyncio.run(disturbed(system, list(undisturbed), lambda: os.kill(pid, signal.SIGSTOP), timeout_s=8.0))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert texts == list(undisturbed.values())
    assert asyncio.run(disturbed(system, list(undisturbed), lambda: None)) == list(undisturbed.values())

    def back() -> None:
        listed = {worker["worker_id"]: worker for worker in system.workers()}
        assert f"tiny/{pool}/{index}" in listed  # its lease ran out while it was stopped
        seen = listed[f"tiny/{pool}/{index}"]
        assert seen["ready"], seen
        assert seen["pid"] == pid
        assert seen.get("connected") is not False

    eventually(back, 30.0)


def test_an_idle_system_sleeps(system: System) -> None:
    processes = [
        psutil.Process(system.pid_of(pool, i))
        for pool, i in (("prefill", 0), ("attention", 0), ("attention", 1), ("ffn", 0), ("ffn", 1))
    ]
    window_s = 4.0

    def asleep() -> None:  # what the last test left behind may still settle in the first window
        start = [sum(p.cpu_times()[:2]) for p in processes]
        time.sleep(window_s)  # real time: processor time over it is what is measured
        for process, used in zip(processes, start, strict=True):
            assert (sum(process.cpu_times()[:2]) - used) / window_s < 0.05, process

    eventually(asleep)
