"""A running deployment to attack, and the list of what came of each attack."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from antiphon.apps.process.config import LogSettings
from antiphon.apps.serve.deployment_set import Serving
from antiphon.apps.serve.gateway_app import GatewayThread, serving_config
from antiphon.apps.serve.local import DirectDeployment
from antiphon.apps.serve.plan import ServeSettings
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.identity import Identity, new_key
from antiphon.core.ids import Role
from antiphon.core.worker_info import WorkerInfo
from antiphon.directory.lease import BlockingDirectory
from antiphon.directory.memory import open_directory
from antiphon.gateway.config import BoundPorts
from antiphon.testing import write_tiny_llama

START_S = 240.0
PEER_TIMEOUT_S = 3.0
_RESULTS = pytest.StashKey[list[tuple[str, str, float]]]()


class Target:
    """prefill + attention + ffn as processes of their own, with every transport that works here, and a gateway before them."""

    def __init__(self, base: Path) -> None:
        self.checkpoint = checkpoint = write_tiny_llama(base / "model")
        (base / "run").mkdir(mode=0o700)
        self.document = document = LLMDeployment.model_validate(
            {
                "apiVersion": "serving.antiphon.dev/v1alpha1",
                "kind": "LLMDeployment",
                "metadata": {"name": "target"},
                "spec": {
                    "model": {"uri": str(checkpoint)},
                    "topology": "pd-afd",
                    "pools": [
                        {"name": "prefill", "role": "prefill"},
                        {"name": "attention", "role": "attention"},
                        {"name": "ffn", "role": "ffn"},
                    ],
                    "cache": {"numBlocks": 256},
                    "endpoint": {"httpPort": 0, "grpcPort": 0},
                    "transport": {"peerTimeoutS": PEER_TIMEOUT_S},
                },
            }
        )
        self.run_dir = base / "run"
        self.stranger = Identity.parse(new_key())
        settings = ServeSettings(log=LogSettings(level="DEBUG"))  # whatever is logged, nothing of what users say is
        self.deployment = DirectDeployment(document, checkpoint=str(checkpoint), run_dir=base / "run", settings=settings)
        self.deployment.start()
        deadline = time.monotonic() + START_S
        while not self.deployment.poll():
            assert time.monotonic() < deadline, "the deployment did not get ready"
            time.sleep(0.05)
        bound = self.deployment._gateway.wait_open(1.0)  # type: ignore[union-attr]
        self.http = f"http://127.0.0.1:{bound.http_port}"
        self.grpc = f"127.0.0.1:{bound.grpc_port}"
        self.directory = BlockingDirectory(open_directory(self.deployment.directory_address))
        self.workers = self._workers()
        self.pids = {info.pid for info in self.workers.values()}
        self.expected = self.ask()
        processes = {role: psutil.Process(info.pid) for role, info in self.workers.items()}
        self.figures = {role.value: (process.num_fds(), process.num_threads()) for role, process in processes.items()}
        self.own_figures = psutil.Process().num_fds(), psutil.Process().memory_info().rss
        self.resident_bytes = {role: process.memory_info().rss for role, process in processes.items()}

    def _workers(self) -> dict[Role, WorkerInfo]:
        return {record.info.role: record.info for record in self.directory.workers()}

    def ask(self, timeout_s: float = 60.0) -> str:
        """The answer of an honest user."""
        body: dict[str, Any] = {"model": "target", "prompt": [5, 6, 7, 8], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        end_s = time.monotonic() + timeout_s
        while True:
            answer = httpx.post(f"{self.http}/v1/completions", json=body, timeout=timeout_s, trust_env=False)
            if answer.status_code != 429 or time.monotonic() > end_s:
                break
            time.sleep(float(answer.headers["retry-after"]))  # a flood may just have ended: told to come again, he does
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def check_unharmed(self) -> None:
        """Every process is the one it was, nobody joined, and an honest user gets the same answer as before."""
        for pid in self.pids:
            assert psutil.pid_exists(pid), "a worker ended"
        now = {record.info.worker_id: record.info.epoch for record in self.directory.workers()}
        assert now == {info.worker_id: info.epoch for info in self.workers.values()}, "one is lost, new, or a stranger's"
        started = time.monotonic()
        assert self.ask() == self.expected
        busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # others of the machine make everybody wait
        assert time.monotonic() - started < 10.0 * busy, "an honest user had to wait"
        assert httpx.get(f"{self.http}/status", timeout=10, trust_env=False).status_code == 200

    def close(self) -> None:
        self.directory.close()
        self.deployment.close()


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    made = Target(tmp_path_factory.mktemp("target"))
    yield made
    made.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or (report.when == "setup" and not report.passed):
        name = item.name.removeprefix("test_").replace("_", " ")
        outcome = "not set up" if report.when == "setup" and report.failed else report.outcome
        item.config.stash.setdefault(_RESULTS, []).append((name, outcome, report.duration))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash.get(_RESULTS, [])
    if results:
        terminalreporter.section("attacks")
        words = {"passed": "held", "failed": "GOT IN", "skipped": "not tried", "not set up": "not tried"}
        for name, outcome, seconds in results:
            terminalreporter.write_line(f"{words[outcome]:>9}  {seconds:6.1f} s  {name}")


@contextmanager
def second_gateway(target: Target, **changes: Any) -> Iterator[BoundPorts]:
    """Another gateway of the deployment, its configuration changed so, once it is ready."""
    config = serving_config(Serving.alone(target.document, str(target.checkpoint)), drain_s=1.0)
    gateway = GatewayThread(replace(config, **changes), target.deployment.directory_address)
    try:
        bound = gateway.wait_open(60.0)
        with httpx.Client(base_url=f"http://127.0.0.1:{bound.http_port}", trust_env=False, timeout=60.0) as client:
            while client.get("/ready").status_code != 200:
                gateway.check()
        yield bound
    finally:
        gateway.close()
