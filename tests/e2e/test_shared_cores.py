"""Attention and FFN workers that take turns on the same processors answer as one worker alone does, beside a busy program too."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from antiphon.apps.serve.local import DirectDeployment, running
from antiphon.core.document.spec import LLMDeployment
from antiphon.testing import write_tiny_moe

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
        reason="this machine has fewer than two processors",
    ),
]

PROMPTS = ["one ring", "to bring them all and in the darkness bind them " * 4, "0123456789 " * 9]


def pools_on(first: int, second: int) -> list[dict[str, Any]]:
    return [
        {"name": "attention", "role": "attention", "threads": 2, "cores": [first, second]},
        {"name": "ffn", "role": "ffn", "threads": 2, "cores": [second, first]},
    ]


@contextmanager
def serving(base: Path, checkpoint: Path, topology: str, pools: list[dict[str, Any]]) -> Iterator[str]:
    """The url of a deployment of real workers."""
    document = LLMDeployment.model_validate(
        {
            "apiVersion": "serving.antiphon.dev/v1alpha1",
            "kind": "LLMDeployment",
            "metadata": {"name": "tiny"},
            "spec": {
                "model": {"uri": str(checkpoint), "dtype": "bfloat16"},
                "topology": topology,
                "pools": pools,
                "cache": {"numBlocks": 256},
                "endpoint": {"httpPort": 0, "grpcPort": 0},
            },
        }
    )
    run_dir = base / topology
    run_dir.mkdir()
    deployment = DirectDeployment(document, checkpoint=str(checkpoint), run_dir=run_dir)
    try:
        deployment.start()
        until(deployment.poll, 90)
        ports = running(run_dir).ports
        assert ports is not None
        url = f"http://127.0.0.1:{ports.http_port}"
        until(lambda: httpx.get(f"{url}/ready", timeout=10).json()["ready_workers"] == len(pools), 30)
        yield url
    finally:
        deployment.close()


def until(check: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.05)


def complete(url: str, prompt: str) -> list[str]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 100, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=90)
    response.raise_for_status()
    tokens: list[str] = response.json()["choices"][0]["logprobs"]["tokens"]
    assert len(tokens) == 100
    return tokens


def test_workers_that_share_processors_answer_as_one_alone(tmp_path: Path) -> None:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    checkpoint = write_tiny_moe(tmp_path / "model")
    with serving(tmp_path, checkpoint, "monolith", [{"name": "all", "role": "monolith", "threads": 1}]) as url:
        expected = [complete(url, prompt) for prompt in PROMPTS]
    with serving(tmp_path, checkpoint, "afd", pools_on(first, second)) as url:
        assert [complete(url, prompt) for prompt in PROMPTS] == expected
        busy = subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{second}}})\nwhile True: pass"])
        try:  # helpers are interrupted in the midst of their parts
            assert [complete(url, prompt) for prompt in PROMPTS] == expected
        finally:
            busy.kill()
            busy.wait(10)
