"""The operator's process parts run for real: kopf watches an API server over HTTP, the lease decides who acts."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from antiphon_operator.controller.handlers import Controller
from antiphon_operator.controller.leader import LeaderElection, LeadershipLost
from antiphon_operator.controller.observability import HealthServer, OperatorMetrics
from antiphon_operator.controller.resync import Resync
from antiphon_operator.controller.run import LEASE_NAME, Options, connection_of, run
from antiphon_operator.kube.base import Kube, KubeError, ServerFault
from antiphon_operator.kube.resources import (
    COMPOSITION,
    LEASE,
    LLM_DEPLOYMENT,
    MODEL_ARTIFACT,
    POD,
    RAY_CLUSTER,
    RAY_SERVICE,
    SERVICE,
    SERVING_POOL,
)
from antiphon_operator.kube.rest import RestKube, load_config
from antiphon_operator.reconcile.artifact import ArtifactReconciler
from antiphon_operator.reconcile.composition import CompositionReconciler
from antiphon_operator.reconcile.llm.reconciler import LLMReconciler
from antiphon_operator.render.settings import Runtime, Settings
from antiphon_operator.testing.http_api import HttpApi
from antiphon_operator.testing.kuberay import KubeRay
from antiphon_operator.testing.memory_api import Call, MemoryApi
from antiphon_operator.testing.memory_kube import MemoryKube

DEADLINE_S = 60.0  # kopf asks again after 1, 1, 2 ... s, and whatever else runs on the processors makes that late
SETTINGS = Settings(runtime=Runtime(image="antiphon/worker:1", ray_version="2.60.0"))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not holds():
            await asyncio.sleep(0.05)


@dataclass
class World:
    api: MemoryApi
    server: HttpApi
    kuberay: KubeRay
    metrics: OperatorMetrics

    def condition(self, type_: str, name: str = "demo") -> tuple[str, str] | None:
        live = self.api.get(LLM_DEPLOYMENT, "default", name) or {}
        found = {c["type"]: c for c in live.get("status", {}).get("conditions", ())}.get(type_)
        return None if found is None else (found["status"], found["reason"])


def document(name: str = "demo") -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"model": {"uri": "/m"}, "pools": [{"name": "all", "role": "monolith"}]},
    }


@contextlib.asynccontextmanager
async def running_world(tmp_path: Path) -> AsyncIterator[World]:
    """An API server on loopback, KubeRay played, and the controller running against it.

    Not a fixture: kopf, when it ends, cancels tasks that began after it, and a fixture's end is one.
    """
    api = MemoryApi(clock=time.time)
    kuberay = KubeRay(api=api)
    metrics = OperatorMetrics()
    async with HttpApi(api) as server:
        path = tmp_path / "kubeconfig"
        path.write_text(server.kubeconfig())
        config = load_config(str(path))
        async with RestKube(config) as kube:

            async def look(door: Kube, namespace: str, name: str) -> float | None:
                return await LLMReconciler(door, SETTINGS, clock=time.time, busy_s=0.2).reconcile(namespace, name)

            controller = Controller(
                {
                    LLM_DEPLOYMENT.kind: LLMReconciler(kube, SETTINGS, clock=time.time, busy_s=0.2).reconcile,
                    COMPOSITION.kind: CompositionReconciler(kube, SETTINGS, clock=time.time).reconcile,
                    MODEL_ARTIFACT.kind: ArtifactReconciler(kube, SETTINGS, clock=time.time).reconcile,
                },
                metrics=metrics,
                login=lambda: connection_of(config),
                namespaces=("default",),
                kube=MemoryKube(api),
                resting=lambda unsettled, looked: Resync(kube, look, unsettled=unsettled, on_pass=looked),
            )
            running = asyncio.create_task(controller.run())

            async def play() -> None:
                while True:
                    kuberay.tick()
                    await asyncio.sleep(0.05)

            playing = asyncio.create_task(play())
            try:
                yield World(api, server, kuberay, metrics)
            finally:
                playing.cancel()
                running.cancel()
                await asyncio.wait((playing, running), timeout=DEADLINE_S)


async def test_a_document_that_is_applied_becomes_ready(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world:
        world.api.create(LLM_DEPLOYMENT, document(), manager="kubectl")
        await until(lambda: world.condition("Ready") == ("True", "Ready"))
        assert world.api.get(RAY_SERVICE, "default", "demo") is not None


async def test_a_cut_watch_with_a_delete_inside_is_repaired(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world:
        world.api.create(LLM_DEPLOYMENT, document(), manager="kubectl")
        await until(lambda: world.condition("Progressing") == ("False", "Complete"))
        refused: list[Call] = []

        def no_watches(call: Call) -> KubeError | None:
            if call.verb in ("watch", "list") and call.resource in ("llmdeployments", "rayservices"):
                refused.append(call)
                return ServerFault("the API server restarts")
            return None

        world.api.faults.append(no_watches)
        world.server.cut_watches()
        await until(lambda: len(refused) > 0)
        world.api.delete(RAY_SERVICE, "default", "demo")
        world.api.create(LLM_DEPLOYMENT, document("other"), manager="kubectl")
        world.api.forget_history()
        world.api.faults.clear()
        await until(lambda: world.condition("Ready", "other") == ("True", "Ready"))
        await until(lambda: world.api.get(RAY_SERVICE, "default", "demo") is not None)
        assert refused, "the watch was never opened again, so nothing was missed"


async def test_a_worker_that_ends_is_told_at_once_though_kuberay_says_nothing(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world:
        world.api.create(LLM_DEPLOYMENT, document(), manager="kubectl")
        await until(lambda: world.condition("Progressing") == ("False", "Complete"))
        world.kuberay.asleep = True
        (worker,) = [
            p for p in world.api.list(POD, "default").items if p["metadata"]["labels"]["serving.antiphon.dev/pool"] == "all"
        ]
        ended = [{"name": "ray-worker", "state": {"terminated": {"exitCode": 1, "reason": "Error"}}}]
        status = {**worker["status"], "containerStatuses": ended}
        world.api.update(POD, {**worker, "status": status}, manager="kubelet", subresource="status")
        await until(lambda: world.condition("Available") == ("False", "PodsPending"))
        live = world.api.get(LLM_DEPLOYMENT, "default", "demo")
        assert live is not None
        assert live["status"]["summary"] == "all 0/1"


async def test_a_deployment_hears_of_the_one_that_is_its_draft_model(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world:
        large = document("large")
        large["spec"]["speculation"] = {"drafter": "model", "model": {"deploymentRef": "small"}}
        world.api.create(LLM_DEPLOYMENT, large, manager="kubectl")
        await until(lambda: world.condition("Accepted", "large") == ("False", "ReferenceNotFound"))
        world.api.create(LLM_DEPLOYMENT, document("small"), manager="kubectl")
        await until(lambda: world.condition("Ready", "large") == ("True", "Ready"))
        service = world.api.get(RAY_SERVICE, "default", "large")
        assert service is not None
        assert "deploymentRef" not in service["spec"]["serveConfigV2"]


async def test_deleting_a_document_removes_everything(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world:
        world.api.create(LLM_DEPLOYMENT, document(), manager="kubectl")
        await until(lambda: world.condition("Ready") == ("True", "Ready"))
        world.api.delete(LLM_DEPLOYMENT, "default", "demo")
        kinds = (RAY_SERVICE, RAY_CLUSTER, POD, SERVICE, SERVING_POOL)
        await until(lambda: all(not world.api.list(kind, None).items for kind in kinds))  # raises TimeoutError while one is left


def election(api: MemoryApi, identity: str, clock: Callable[[], float]) -> LeaderElection:
    return LeaderElection(MemoryKube(api), namespace="system", name="operator", identity=identity, clock=clock)


async def test_only_one_replica_leads_and_the_other_takes_over_after_the_lease() -> None:
    now = [100.0]
    api = MemoryApi(clock=lambda: now[0])
    first, second = election(api, "first", lambda: now[0]), election(api, "second", lambda: now[0])
    assert await first.try_acquire()
    assert not await second.try_acquire()
    now[0] += 59
    assert not await second.try_acquire()
    now[0] += 2
    assert await second.try_acquire()
    with pytest.raises(LeadershipLost):
        await first.renew()
    assert not first.leading


async def test_a_renewed_lease_is_not_taken() -> None:
    now = [100.0]
    api = MemoryApi(clock=lambda: now[0])
    first, second = election(api, "first", lambda: now[0]), election(api, "second", lambda: now[0])
    await first.try_acquire()
    for _ in range(5):
        now[0] += 44
        await first.renew()
        assert not await second.try_acquire()


async def test_a_leader_that_cannot_renew_stops_before_another_may_start() -> None:
    now = [100.0]
    api = MemoryApi(clock=lambda: now[0])
    first, second = election(api, "first", lambda: now[0]), election(api, "second", lambda: now[0])
    await first.try_acquire()
    assert not await second.try_acquire()
    api.faults.append(lambda call: ServerFault("unreachable"))
    now[0] += 44.9
    await first.renew()  # forgiven
    now[0] += 0.2
    with pytest.raises(LeadershipLost):
        await first.renew()
    api.faults.clear()
    assert not await second.try_acquire()  # the lease itself still stands


async def test_a_leader_kept_from_running_goes_on_while_nobody_has_led_instead() -> None:
    now = [100.0]
    api = MemoryApi(clock=lambda: now[0])
    first, second = election(api, "first", lambda: now[0]), election(api, "second", lambda: now[0])
    await first.try_acquire()
    now[0] += 300  # a starved machine: nothing of this process ran, so nothing of it could do harm
    await first.renew()
    assert first.leading
    assert not await second.try_acquire()
    now[0] += 61
    assert await second.try_acquire()
    with pytest.raises(LeadershipLost):
        await first.renew()


async def test_the_operator_runs_as_a_user_that_no_passwd_file_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 65532")

    monkeypatch.setattr(getpass, "getuser", unknown)
    monkeypatch.delenv("POD_ID", raising=False)
    api = MemoryApi(clock=time.time)
    api.create(LLM_DEPLOYMENT, document(), manager="kubectl")
    async with replica(api, tmp_path):  # raises what the operator ended with
        await until(lambda: api.get(RAY_SERVICE, "default", "demo") is not None)


async def test_probes_leave_no_lines_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    server = HealthServer(OperatorMetrics(), host="127.0.0.1", port=0, ready=lambda: True)
    async with server, httpx.AsyncClient() as client:
        for _ in range(3):
            await client.get(f"http://127.0.0.1:{server.port}/healthz")
    assert [record for record in caplog.records if record.name.startswith("aiohttp")] == []


async def test_a_released_lease_is_free_at_once() -> None:
    now = [100.0]
    api = MemoryApi(clock=lambda: now[0])
    first, second = election(api, "first", lambda: now[0]), election(api, "second", lambda: now[0])
    await first.try_acquire()
    await first.release()
    assert await second.try_acquire()


async def test_of_two_that_start_at_once_one_leads() -> None:
    api = MemoryApi(clock=lambda: 100.0)
    both = [election(api, name, lambda: 100.0) for name in ("first", "second")]
    assert sorted(await asyncio.gather(*(one.try_acquire() for one in both))) == [False, True]


async def test_health_and_metrics_answer() -> None:
    metrics = OperatorMetrics()
    metrics.passes.labels(kind="LLMDeployment", result="ok").inc()
    ready = [False]
    async with HealthServer(metrics, host="127.0.0.1", port=0, ready=lambda: ready[0]) as server, httpx.AsyncClient() as client:
        base = f"http://127.0.0.1:{server.port}"
        assert (await client.get(f"{base}/healthz")).status_code == 200
        assert (await client.get(f"{base}/readyz")).status_code == 503
        ready[0] = True
        assert (await client.get(f"{base}/readyz")).status_code == 200
        assert (
            'antiphon_operator_reconciles_total{kind="LLMDeployment",result="ok"} 1.0' in (await client.get(f"{base}/metrics")).text
        )


@contextlib.asynccontextmanager
async def replica(api: MemoryApi, tmp_path: Path) -> AsyncIterator[asyncio.Task[None]]:
    """The operator's whole process, but in this one."""
    async with HttpApi(api) as server:
        path = tmp_path / "kubeconfig"
        path.write_text(server.kubeconfig())
        options = Options(settings=SETTINGS, kubeconfig=str(path), namespaces=("default",), host="127.0.0.1", port=0)
        running = asyncio.create_task(run(options))
        try:
            yield running
        finally:
            running.cancel()
            await asyncio.wait((running,), timeout=DEADLINE_S)


async def ends(running: asyncio.Task[None]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await running


def holder(api: MemoryApi) -> str | None:
    lease = api.get(LEASE, "default", LEASE_NAME)
    return None if lease is None else str(lease["spec"]["holderIdentity"])


async def test_a_leader_that_is_told_to_end_gives_its_lease_up(tmp_path: Path) -> None:
    api = MemoryApi(clock=time.time)
    api.create(LLM_DEPLOYMENT, document(), manager="kubectl")
    async with replica(api, tmp_path) as running:
        await until(lambda: api.get(RAY_SERVICE, "default", "demo") is not None)
        assert holder(api)
        os.kill(os.getpid(), signal.SIGTERM)
        await ends(running)
    assert holder(api) == ""


async def test_a_replica_that_waits_writes_nothing_and_ends_when_it_is_told_to(tmp_path: Path) -> None:
    api = MemoryApi(clock=time.time)
    api.create(LLM_DEPLOYMENT, document(), manager="kubectl")
    other = LeaderElection(MemoryKube(api), namespace="default", name=LEASE_NAME, identity="other", clock=time.monotonic)
    await other.try_acquire()
    api.calls.clear()
    async with replica(api, tmp_path) as running:
        await until(lambda: any(call.resource == "leases" for call in api.calls))
        os.kill(os.getpid(), signal.SIGTERM)
        await ends(running)
    assert holder(api) == "other"
    assert not [call for call in api.calls if call.writes]
