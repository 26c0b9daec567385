"""A part of the deployment is stopped, and nobody stands by: whoever asks is told at once, and what was begun goes on after it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from antiphon.core.ids import Role

from .conftest import PEER_TIMEOUT_S, Target

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

SLACK_S = 10.0  # for a loaded machine


@pytest.fixture(autouse=True)
def unharmed(target: Target) -> Iterator[None]:
    yield
    target.check_unharmed()


def body(prompt: list[int], max_tokens: int) -> dict[str, Any]:
    return {"model": "target", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


def test_without_a_replica_a_stopped_ffn_worker_is_told_of_and_costs_no_stream_a_token(target: Target) -> None:
    pid = target.workers[Role.FFN].pid
    prompt = list(range(5, 25))
    with httpx.Client(base_url=target.http, trust_env=False, timeout=120) as client:
        whole = client.post("/v1/completions", json=body(prompt, 200)).json()["choices"][0]["text"]
        text, begun = "", threading.Event()

        def stream() -> None:
            nonlocal text
            with client.stream("POST", "/v1/completions", json={**body(prompt, 200), "stream": True}) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["text"]
                        begun.set()

        reader = threading.Thread(target=stream, daemon=True)
        reader.start()
        assert begun.wait(60)
        os.kill(pid, signal.SIGSTOP)
        try:
            end = time.monotonic() + PEER_TIMEOUT_S + 3.0 + SLACK_S
            while True:
                refused = client.post("/v1/completions", json=body([5, 6], 1), headers={"x-request-timeout-s": "1"})
                if refused.status_code == 503 or time.monotonic() > end:
                    break
            assert refused.status_code == 503, refused.text
            assert float(refused.headers["retry-after"]) > 0
            assert "no FFN worker holds a shard" in refused.json()["error"]["message"]
            workers = {worker["worker_id"]: worker for worker in client.get("/status").json()["workers"]}
            attention = workers["target/attention/0"]
            assert not attention["ready"]
            assert "target/ffn/0" in attention["message"]
        finally:
            os.kill(pid, signal.SIGCONT)
        reader.join(60)
        assert text == whole
    await_ready(target)


def await_ready(target: Target) -> None:
    """Wait until requests are taken again."""
    end = time.monotonic() + 30.0
    while httpx.get(f"{target.http}/ready", timeout=10, trust_env=False).status_code != 200:
        assert time.monotonic() < end, "it did not come back"
        time.sleep(0.1)


def test_a_request_to_a_stopped_attention_worker_waits_no_longer_than_its_deadline(target: Target) -> None:
    pid = target.workers[Role.ATTENTION].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        with httpx.Client(base_url=target.http, trust_env=False, timeout=120) as client:
            answer = client.post("/v1/completions", json=body([5, 6], 1), headers={"x-request-timeout-s": "6"})
        assert answer.status_code in (503, 504), answer.text
        assert time.monotonic() - started < 6.0 + SLACK_S
    finally:
        os.kill(pid, signal.SIGCONT)

    await_ready(target)
    assert target.ask() == target.expected
