"""What lm-eval's ``local-completions`` sends and how it reads answers: the likelihoods are transformers', whatever the wiring."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from antiphon.core.request import Request, RequestId, RequestOutput
from antiphon.testing import LocalCluster, wiring, write_tiny_llama

_spec = importlib.util.spec_from_file_location(
    "doors_fake_engine", Path(__file__).parents[2] / "contract" / "doors" / "fake_engine.py"
)
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)


class ClusterEngine:
    """A whole LocalCluster behind a fake worker's door, stepped by a thread of its own."""

    max_num_seqs, max_queued, prepare = 8, 256, None

    def __init__(self, cluster: LocalCluster) -> None:
        self.on_steps: Callable[[Sequence[RequestOutput]], None] = lambda outputs: None
        self._cluster = cluster
        self._engine = cluster.generating[0].engine
        self._engine._outbox = lambda outputs: self.on_steps(outputs)  # the cluster's own keeps outputs for tests
        self._work, self._closed = threading.Event(), threading.Event()
        self._engine.wake = self._work.set
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> None:
        self._engine.submit(request)

    def abort(self, request_id: RequestId) -> None:
        self._engine.abort(request_id)

    def close(self) -> None:
        self._closed.set()
        self._work.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._closed.is_set():
            self._work.clear()
            if not self._cluster.step():
                self._work.wait(1.0)


# (context, continuation) as the harness makes them of a task's documents, one of a single token.
CASES = [([(7 * i + start) % 250 + 3 for i in range(length)], [(11 * i) % 250 + 3 for i in range(count)])
         for start, length, count in ((0, 60, 9), (0, 60, 4), (5, 1, 1), (9, 33, 20))]  # fmt: skip
WIRINGS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "monolith, prefix cache": ("monolith", {}, True),
    "monolith, no prefix cache": ("monolith", {}, False),
    "1A2F, prefix cache": ("afd", {"ffn": 2}, True),
}


def read(answer: dict[str, Any], context: Sequence[int]) -> tuple[float, bool]:
    """As lm-eval 0.4 reads a choice: the sum behind the context, the generated token left out; and whether it is all greedy."""
    logprobs = answer["choices"][0]["logprobs"]
    values = logprobs["token_logprobs"][len(context) : -1]
    tops = logprobs["top_logprobs"][len(context) : -1]
    return sum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))


@pytest.mark.parametrize("name", WIRINGS)
async def test_the_harness_gets_transformers_likelihoods(tmp_path: Path, name: str) -> None:
    topology, counts, caches = WIRINGS[name]
    checkpoint = write_tiny_llama(tmp_path / "tiny")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    spec = wiring(checkpoint, topology, scheduler={"maxNumBatchedTokens": 32}, cache={"prefixCaching": caches}, **counts)
    with LocalCluster(spec, checkpoint) as cluster:
        async with (
            fake.world(tmp_path, workers=(), gateway={"models": {fake.MODEL: checkpoint}}) as world,
            httpx.AsyncClient(base_url=world.url, timeout=60) as client,
        ):
            engine = ClusterEngine(cluster)
            made = fake.make_worker(world.directory, "0", world.tokenizer, world.allowed, max_model_len=1024)
            worker = fake.FakeWorker(world.directory, engine, replace(made.info, vocab_size=384))
            engine.start()
            await worker.start()
            world.workers.append(worker)
            while (await client.get("/ready")).status_code != 200:
                pass
            for context, continuation in CASES:
                ids = context + continuation
                with torch.inference_mode():
                    logprobs_TV = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
                expected = sum(float(logprobs_TV[at - 1, ids[at]]) for at in range(len(context), len(ids)))
                greedy = all(int(logprobs_TV[at - 1].argmax()) == ids[at] for at in range(len(context), len(ids)))
                body = {
                    "model": fake.MODEL,
                    "prompt": [ids],
                    "temperature": 0,
                    "max_tokens": 1,
                    "logprobs": 1,
                    "seed": 1234,
                    "echo": True,
                }
                whole = (await client.post("/v1/completions", json=body)).json()
                assert read(whole, context) == (pytest.approx(expected, abs=1e-4), greedy)
                prompt_only = (await client.post("/v1/completions", json={**body, "max_tokens": 0})).json()
                assert sum(prompt_only["choices"][0]["logprobs"]["token_logprobs"][len(context) :]) == pytest.approx(
                    expected, abs=1e-4
                )
                streamed = (await client.post("/v1/completions", json={**body, "stream": True})).text
                events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
                joined = join([event["choices"][0] for event in events])
                told = whole["choices"][0]
                assert joined["text"] == told["text"]
                assert {key: joined["logprobs"][key] for key in ("tokens", "text_offset")} == {
                    key: told["logprobs"][key] for key in ("tokens", "text_offset")
                }
                for found, wanted in zip(joined["logprobs"]["token_logprobs"], told["logprobs"]["token_logprobs"], strict=True):
                    assert found == (None if wanted is None else pytest.approx(wanted, abs=1e-4))


def join(choices: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream's chunks as one choice."""
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"] is not None]
    logprobs = {key: [value for part in parts for value in part[key]] for key in parts[0]}
    return {"text": "".join(choice["text"] for choice in choices), "logprobs": logprobs}
