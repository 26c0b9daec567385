"""Experts that move between real FFN processes while they serve, and a replica that is killed meanwhile. Tokens never differ."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from antiphon.apps.serve.local import DirectDeployment, running
from antiphon.core.document.spec import LLMDeployment
from antiphon.models.experts.placement import ExpertPlacement
from antiphon.models.families import describe
from antiphon.rpc.experts import ExpertsCalls, RebalanceWish
from antiphon.testing import write_tiny_moe

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

PROMPTS = ["one ring", "to bring them all and in the darkness bind them " * 2, "x", "0123456789 " * 5]


class System:
    """2 attention workers, 2 groups of experts with 2 replicas each."""

    def __init__(self, base: Path) -> None:
        self.checkpoint = write_tiny_moe(base / "model")
        self.config = describe(json.loads((self.checkpoint / "config.json").read_text()))
        self.run_dir = base / "run"
        self.run_dir.mkdir()
        document = LLMDeployment.model_validate(
            {
                "apiVersion": "serving.antiphon.dev/v1alpha1",
                "kind": "LLMDeployment",
                "metadata": {"name": "tiny"},
                "spec": {
                    "model": {"uri": str(self.checkpoint), "dtype": "float32"},
                    "topology": "afd",
                    "pools": [
                        {"name": "attention", "role": "attention", "replicas": 2},
                        {"name": "ffn", "role": "ffn", "replicas": 4, "parallelism": {"expert": 2}},
                    ],
                    "cache": {"numBlocks": 256},
                    "endpoint": {"httpPort": 0, "grpcPort": 0},
                    "directory": {"leaseS": 6},
                },
            }
        )
        self.deployment = DirectDeployment(document, checkpoint=str(self.checkpoint), run_dir=self.run_dir)
        self.deployment.start()
        self.until(self.deployment.poll, 90)
        ports = running(self.run_dir).ports
        assert ports is not None
        self.url = f"http://127.0.0.1:{ports.http_port}"
        self.grpc = f"127.0.0.1:{ports.grpc_port}"
        # The gateway looks into the directory now and then: workers are ready before it knows.
        self.until(lambda: httpx.get(f"{self.url}/ready", timeout=10).json()["ready_workers"] == 6)
        self.calls = ExpertsCalls(self.grpc)

    @staticmethod
    def until(check: Any, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < deadline, "did not come true in time"
            time.sleep(0.05)

    def workers(self, role: str) -> list[dict[str, Any]]:
        found = httpx.get(f"{self.url}/status", timeout=10).json()["workers"]
        return [worker for worker in found if worker["role"] == role]

    def pid_of(self, index: int) -> int:
        """0 while it is not ready."""
        return next((worker.pid for worker in running(self.run_dir).workers if worker.subject == f"ffn/{index}"), 0)

    def complete(self, prompt: str, max_tokens: int = 100) -> list[str]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "logprobs": 0}
        response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=90)
        response.raise_for_status()
        choice = response.json()["choices"][0]
        assert choice["finish_reason"] == "length"
        tokens: list[str] = choice["logprobs"]["tokens"]
        return tokens

    def move_to(self, placement: ExpertPlacement) -> int:
        """Wish for a placement; its number once every worker works by it and holds nothing else."""
        before = max(worker["load"]["placement"] for worker in self.workers("attention"))
        self.calls.rebalance(RebalanceWish(placement_json=placement.to_json(self.config)))

        def done() -> bool:
            return all(w["load"]["placement"] > before for w in [*self.workers("attention"), *self.workers("ffn")])

        self.until(done)
        return max(worker["load"]["placement"] for worker in self.workers("attention"))


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running_system = System(tmp_path_factory.mktemp("experts"))
    try:
        yield running_system
    finally:
        running_system.calls.close()
        running_system.deployment.close()


@pytest.fixture(scope="module")
def undisturbed(system: System) -> list[list[str]]:
    return [system.complete(prompt) for prompt in PROMPTS]


def placements(system: System, num: int) -> list[ExpertPlacement]:
    chance = random.Random(3)
    rows = [{n: [chance.random() ** 4 for _ in range(8)] for n in range(2)} for _ in range(num)]
    return [ExpertPlacement.balanced(system.config, loads, 2, num_redundant=i % 3) for i, loads in enumerate(rows)]


class Talk:
    """All prompts at once, again and again, until told to stop."""

    def __init__(self, system: System) -> None:
        self.answers: list[tuple[int, list[str]]] = []
        self.errors: list[BaseException] = []
        self._system = system
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(len(PROMPTS))]

    def _run(self, index: int) -> None:
        try:
            while not self._stop.is_set():
                self.answers.append((index, self._system.complete(PROMPTS[index])))
        except BaseException as error:  # noqa: BLE001 - the test raises it
            self.errors.append(error)

    def __enter__(self) -> Talk:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(100)

    def check(self, undisturbed: list[list[str]]) -> None:
        assert not self.errors, self.errors
        assert len(self.answers) >= len(PROMPTS)
        for index, tokens in self.answers:
            assert tokens == undisturbed[index], PROMPTS[index]


def test_moves_while_serving_change_no_token_and_meet_no_row_of_an_older_map(system: System, undisturbed: list[list[str]]) -> None:
    numbers = []
    with Talk(system) as talk:
        for placement in placements(system, 3):
            numbers.append(system.move_to(placement))
    talk.check(undisturbed)
    assert numbers == sorted(set(numbers))
    for worker in system.workers("ffn"):
        assert worker["load"]["gauges"]["num_stale_messages"] == 0
        assert worker["load"]["gauges"]["num_late_experts"] == 0, "an expert was asked for before it was held"


def test_rows_are_counted_shown_and_balanced_by_command(system: System, undisturbed: list[list[str]], tmp_path: Path) -> None:
    from antiphon.cli.models.experts import app

    system.complete(PROMPTS[0])
    body = httpx.get(f"{system.url}/experts", timeout=10).json()
    assert set(body["rows"]) == {"0", "1"}
    assert sum(body["rows"]["0"]) == sum(body["rows"]["1"]) > 0, "every row chooses two experts in each layer"
    load = tmp_path / "load.json"
    shown = CliRunner().invoke(app, ["load", "-e", system.grpc, "-o", str(load)], env={"COLUMNS": "120"})
    assert shown.exit_code == 0, shown.output
    assert "x mean" in shown.output
    assert json.loads(load.read_text())["rows"].keys() == body["rows"].keys()
    before = body["placement"]
    wished = CliRunner().invoke(app, ["rebalance", "-e", system.grpc, "--redundant", "2"])
    assert wished.exit_code == 0, wished.output
    system.until(lambda: httpx.get(f"{system.url}/experts", timeout=10).json()["placement"] > before)
    saved = tmp_path / "placement.json"
    assert CliRunner().invoke(app, ["placement", "-e", system.grpc, "-o", str(saved)]).exit_code == 0
    placement = ExpertPlacement.load(saved, system.config)
    assert any(len(held) == 2 for layer in placement.groups for held in layer)
    assert [system.complete(prompt) for prompt in PROMPTS] == undisturbed

    def counted() -> bool:
        text = httpx.get(f"{system.url}/metrics", timeout=10).text
        return "antiphon_expert_rows_total{" in text and "antiphon_expert_imbalance{" in text

    system.until(counted)


def test_a_replica_killed_while_experts_move_loses_no_token(system: System, undisturbed: list[list[str]]) -> None:
    (placement,) = placements(system, 5)[4:]
    with Talk(system) as talk:
        system.until(lambda: talk.answers)
        pid = system.pid_of(0)
        assert pid > 0
        with ThreadPoolExecutor(1) as pool:
            moving = pool.submit(system.move_to, placement)
            os.kill(pid, signal.SIGKILL)
            moving.result(60)
        system.until(lambda: system.pid_of(0) not in (0, pid), 60)  # a new process imports torch
    talk.check(undisturbed)
    system.until(lambda: len({w["load"]["placement"] for w in [*system.workers("ffn"), *system.workers("attention")]}) == 1)
