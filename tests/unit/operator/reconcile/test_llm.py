"""LLMDeployments from document to Ready, through failures, over the in-memory API with KubeRay played."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from antiphon_operator.api.conditions import seconds
from antiphon_operator.api.crds import KINDS, definition
from antiphon_operator.controller.observability import JsonFormatter
from antiphon_operator.controller.work_queue import WorkQueue
from antiphon_operator.kube.base import Conflict, KubeError, NotFound, ServerFault, Throttled, error_of
from antiphon_operator.kube.resources import (
    CONTROLLER_REVISION,
    DISRUPTION_BUDGET,
    EVENT,
    HTTP_ROUTE,
    INFERENCE_POOL,
    LLM_DEPLOYMENT,
    MODEL_ARTIFACT,
    NETWORK_POLICY,
    POD,
    RAY_CLUSTER,
    RAY_SERVICE,
    SERVICE,
    SERVING_POOL,
    Resource,
)
from antiphon_operator.reconcile.llm.reconciler import LLMReconciler
from antiphon_operator.reconcile.writer import contains
from antiphon_operator.render.settings import Runtime, Settings
from antiphon_operator.testing.kuberay import KubeRay
from antiphon_operator.testing.memory_api import Call, MemoryApi
from antiphon_operator.testing.memory_kube import MemoryKube

SETTINGS = Settings(runtime=Runtime(image="antiphon/worker:1", ray_version="2.60.0"))


class Killed(BaseException):
    """The operator's process ends here."""


@dataclass
class Cluster:
    now_s: float = 1_700_000_000.0
    api: MemoryApi = field(init=False)
    kuberay: KubeRay = field(init=False)
    settings: Settings = SETTINGS

    def __post_init__(self) -> None:
        self.api = MemoryApi(clock=lambda: self.now_s)
        self.kuberay = KubeRay(api=self.api)

    def reconcile(self) -> float | None:
        reconciler = LLMReconciler(MemoryKube(self.api), self.settings, clock=lambda: self.now_s, gateways=self.kuberay)
        return asyncio.run(reconciler.reconcile("default", "demo"))

    def create(self, spec: dict[str, Any]) -> None:
        value = {"metadata": {"name": "demo", "namespace": "default"}, "spec": spec}
        self.api.create(LLM_DEPLOYMENT, value, manager="kubectl")

    def edit(self, change: Callable[[dict[str, Any]], None]) -> None:
        value = self.live
        change(value["spec"])
        self.api.update(LLM_DEPLOYMENT, value, manager="kubectl")

    @property
    def live(self) -> dict[str, Any]:
        found = self.api.get(LLM_DEPLOYMENT, "default", "demo")
        assert found is not None
        return found

    @property
    def ray_service(self) -> dict[str, Any]:
        found = self.api.get(RAY_SERVICE, "default", "demo")
        assert found is not None
        return found

    def condition(self, type_: str) -> tuple[str, str]:
        found = {c["type"]: c for c in self.live["status"]["conditions"]}[type_]
        return found["status"], found["reason"]

    def message(self, type_: str) -> str:
        return str({c["type"]: c for c in self.live["status"]["conditions"]}[type_]["message"])

    def run(self, passes: int = 20, step_s: float = 5.0) -> None:
        for _ in range(passes):
            self.reconcile()
            self.kuberay.tick()
            self.now_s += step_s

    def writes(self) -> list[Call]:
        return [call for call in self.api.calls if call.writes]


def spec(**extra: Any) -> dict[str, Any]:
    return {
        "model": {"uri": "/models/smol", "name": "smol"},
        "topology": "afd",
        "pools": [
            {"name": "attention", "role": "attention", "replicas": 2, "resources": {"gpu": 1}},
            {"name": "ffn", "role": "ffn", "replicas": 2, "parallelism": {"expert": 2}, "resources": {"gpu": 1}},
        ],
        **extra,
    }


@pytest.fixture
def cluster() -> Cluster:
    made = Cluster()
    made.create(spec())
    return made


def test_a_document_becomes_ready_and_says_where_it_serves(cluster: Cluster) -> None:
    cluster.run()
    status = cluster.live["status"]
    assert cluster.condition("Ready") == ("True", "Ready")
    assert cluster.condition("Progressing") == ("False", "Complete")
    assert status["summary"] == "attn 2/2, ffn 2/2"
    assert status["url"] == "http://demo-http.default.svc:8000/v1"
    assert status["model"] == "smol"
    assert status["lastGoodRevision"] == status["revision"] != ""
    assert list(status["stages"]) == ["started", "scheduled", "imagePulled", "weightsReady", "engineReady"]


def test_at_rest_a_reconcile_writes_nothing_and_reads_ten_times(cluster: Cluster) -> None:
    cluster.run()
    cluster.api.calls.clear()
    assert cluster.reconcile() == 600.0
    assert cluster.writes() == []
    assert len(cluster.api.calls) == 10


def test_what_a_user_sees_first_is_initializing(cluster: Cluster) -> None:
    cluster.reconcile()
    assert cluster.condition("Ready") == ("False", "Initializing")


def test_statuses_fit_their_schemas(cluster: Cluster) -> None:
    cluster.run()
    for kind, resource in (("LLMDeployment", LLM_DEPLOYMENT), ("ServingPool", SERVING_POOL)):
        (found,) = [k for k in KINDS if k.kind == kind]
        for item in cluster.api.list(resource, "default").items:
            found.status.model_validate(item["status"] | {"conditions": tuple(item["status"]["conditions"])}, strict=False)
            schema = definition(found)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
            assert set(item["status"]) <= set(schema["properties"])


def test_services_lead_to_the_cluster_that_serves(cluster: Cluster) -> None:
    cluster.run()
    active = cluster.ray_service["status"]["activeServiceStatus"]["rayClusterName"]
    service = cluster.api.get(SERVICE, "default", "demo-http")
    assert service is not None
    assert service["spec"]["selector"]["ray.io/cluster"] == active


def test_a_serve_change_keeps_the_cluster(cluster: Cluster) -> None:
    cluster.run()
    before = cluster.ray_service["status"]["activeServiceStatus"]["rayClusterName"]
    cluster.edit(lambda s: s.update(scheduler={"maxNumSeqs": 8}))
    cluster.run()
    assert cluster.ray_service["status"]["activeServiceStatus"]["rayClusterName"] == before
    assert "maxNumSeqs: 8" in cluster.ray_service["spec"]["serveConfigV2"]
    assert cluster.condition("Progressing") == ("False", "Complete")


def test_a_cluster_change_surges_and_is_available_throughout_but_ready_only_once_it_serves(cluster: Cluster) -> None:
    """On a real cluster READY stood at True for the minutes in which the old revision still answered."""
    cluster.run()
    old = cluster.live["status"]["activeCluster"]
    cluster.edit(lambda s: s["pools"][0].update(env={"A": "1"}))
    reasons = []
    for _ in range(12):
        cluster.run(1)
        assert cluster.condition("Available")[0] == "True"
        status, reason = cluster.condition("Ready")
        assert status == str(cluster.live["status"]["activeCluster"] != old), reason
        reasons.append(reason)
    assert "NewRevision" in reasons
    assert cluster.condition("Progressing") == ("False", "Complete")
    assert len(cluster.api.list(RAY_CLUSTER, "default").items) == 1
    assert cluster.kuberay.max_gpus_seen == 8


def test_a_budget_turns_surge_into_recreate_and_is_never_exceeded() -> None:
    cluster = Cluster()
    cluster.create(spec(gpuBudget=5))
    cluster.run()
    cluster.edit(lambda s: s["pools"][0].update(env={"A": "1"}))
    cluster.run()
    assert cluster.condition("Ready") == ("True", "Ready")
    assert cluster.live["status"]["rollout"]["strategy"] == "Recreate"
    assert cluster.kuberay.max_gpus_seen <= 5


def test_a_new_replica_count_changes_only_the_size(cluster: Cluster) -> None:
    cluster.run()
    before = cluster.ray_service
    cluster.edit(lambda s: s["pools"][0].update(replicas=3))
    cluster.run()
    after = cluster.ray_service
    assert contains(before["spec"]["rayClusterConfig"], after["spec"]["rayClusterConfig"]), "KubeRay's zero values aside"
    assert after["metadata"]["annotations"]["serving.antiphon.dev/revision"] == cluster.live["status"]["lastGoodRevision"]
    assert cluster.live["status"]["summary"] == "attn 3/3, ffn 2/2"


def test_a_failed_rollout_goes_back_and_never_runs_three_clusters(cluster: Cluster) -> None:
    cluster.edit(lambda s: s.update(rollout={"progressDeadlineS": 60}))
    cluster.run()
    good = cluster.live["status"]["revision"]
    cluster.kuberay.broken_images.add("antiphon/worker:broken")
    cluster.edit(lambda s: s.update(kubernetes={"image": "antiphon/worker:broken"}))
    cluster.run(8)
    assert cluster.condition("PoolsReady") == ("False", "CrashLoop")
    assert cluster.condition("Ready") == ("False", "NewRevision")
    assert cluster.condition("Available")[0] == "True"
    cluster.run(40)
    assert cluster.condition("Progressing") == ("False", "RolledBack")
    assert cluster.live["status"]["revision"] == good
    assert cluster.condition("Ready") == ("False", "RolledBack"), "what was asked for is not what serves"
    assert cluster.condition("Available") == ("True", "Ready")
    assert cluster.kuberay.max_clusters_seen == 2


def test_pods_that_crash_and_are_made_anew_and_old_ones_that_flap_are_no_progress(cluster: Cluster) -> None:
    """On a busy node a bad revision was not given up: readiness of the old gateway came and went, and each time counted."""
    cluster.edit(lambda s: s.update(rollout={"progressDeadlineS": 60}))
    cluster.run()
    good, old = cluster.live["status"]["revision"], cluster.live["status"]["activeCluster"]
    cluster.kuberay.broken_images.add("antiphon/worker:broken")
    cluster.edit(lambda s: s.update(kubernetes={"image": "antiphon/worker:broken"}))
    for i in range(40):
        cluster.run(1)
        if cluster.live["status"].get("failedRevision"):
            break
        for pod in cluster.api.list(POD, "default").items:
            if pod["metadata"]["labels"]["ray.io/cluster"] != old:
                if i > 4:
                    cluster.api.delete(POD, "default", pod["metadata"]["name"])
            elif pod["metadata"]["labels"]["ray.io/group"] == "gateway":
                conditions = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "False" if i % 2 else "True"}]
                status = {**pod["status"], "conditions": conditions}
                cluster.api.update(POD, {**pod, "status": status}, manager="kubelet", subresource="status")
    assert i < 30, "given up within its deadline"
    cluster.run(30)
    assert cluster.condition("Progressing") == ("False", "RolledBack")
    assert cluster.live["status"]["revision"] == good


def test_without_rollback_a_failed_rollout_stalls(cluster: Cluster) -> None:
    cluster.edit(lambda s: s.update(rollout={"progressDeadlineS": 60, "autoRollback": False}))
    cluster.kuberay.broken_images.add("antiphon/worker:1")
    cluster.run(40)
    assert cluster.condition("Progressing") == ("False", "ProgressDeadlineExceeded")
    assert cluster.condition("Stalled") == ("True", "ProgressDeadlineExceeded")


def test_the_first_unschedulable_pods_message_is_told(cluster: Cluster) -> None:
    cluster.kuberay.num_gpus = 3
    cluster.run()
    assert cluster.condition("PoolsReady") == ("False", "PodsPending")
    assert "Insufficient nvidia.com/gpu" in cluster.message("PoolsReady")


def test_ready_with_an_unhealthy_deployment_is_not_ready(cluster: Cluster) -> None:
    cluster.run()
    cluster.kuberay.unhealthy["pool-ffn"] = "UNHEALTHY"
    cluster.run(3)
    assert cluster.condition("Ready") == ("False", "DeploymentUnhealthy")


def test_why_serve_calls_a_deployment_unhealthy_is_in_the_message_without_its_traceback(cluster: Cluster) -> None:
    cluster.run()
    frames = "".join(f'  File "/opt/antiphon/lib/module_{i}.py", line {i}, in call\n    return self.next()\n' for i in range(40))
    said = "The deployment failed to start 3 times in a row. This may be due to a problem with its constructor. Error:\n"
    cluster.kuberay.unhealthy["pool-ffn"] = "UNHEALTHY"
    cluster.kuberay.messages["pool-ffn"] = (
        f"{said}Traceback (most recent call last):\n{frames}OSError: weights.safetensors is cut\n"
    )
    cluster.run(3)
    for type_ in ("Ready", "PoolsReady"):
        message = cluster.message(type_)
        assert "OSError: weights.safetensors is cut" in message
        assert "failed to start 3 times" in message
        assert "\n" not in message
        assert "Error:)" not in message


def test_a_scale_is_no_new_revision_and_ready_stays_true() -> None:
    cluster = Cluster()
    cluster.create(external())
    cluster.run()
    scale(cluster, 4)
    seen = set()
    for _ in range(12):
        cluster.run(1)
        seen.add((cluster.condition("Ready"), cluster.live["status"]["summary"]))
        assert cluster.condition("Progressing")[1] != "NewRevision"
    assert {ready for ready, _ in seen} == {("True", "Ready")}
    assert {summary for _, summary in seen} >= {"attn 2/4, ffn 2/2", "attn 4/4, ffn 2/2"}, "it was seen on its way"


def test_a_kuberay_that_reads_past_suspend_is_told() -> None:
    cluster = Cluster()
    cluster.create(spec())
    cluster.run()
    cluster.kuberay.knows_suspend = False
    cluster.edit(lambda s: s.update(suspend=True))
    cluster.run()
    for type_, status in (("Ready", "False"), ("Progressing", "False"), ("Stalled", "True")):
        assert cluster.condition(type_) == (status, "UnsupportedKubeRay")
    assert "spec.suspend" in cluster.message("Ready")
    assert cluster.condition("Available") == ("False", "Initializing") or cluster.api.list(POD, "default").items
    cluster.kuberay.knows_suspend = True
    cluster.run()
    assert cluster.condition("Ready") == ("False", "Suspended")
    assert cluster.condition("Stalled") == ("False", "Healthy")


def test_how_the_pods_of_a_replaced_cluster_end_is_no_crash_loop(cluster: Cluster) -> None:
    cluster.run()
    old = {pod["metadata"]["name"] for pod in cluster.api.list(POD, "default").items}
    cluster.edit(lambda s: s.update(kubernetes={"image": "antiphon/worker:next"}))
    told = set()
    ended = 0
    for _ in range(25):
        cluster.run(1)
        left = [pod for pod in cluster.api.list(POD, "default").items if pod["metadata"]["name"] in old]
        service = cluster.ray_service["status"]
        if left and "rayClusterName" not in service["pendingServiceStatus"]:
            active = service["activeServiceStatus"].get("rayClusterName")
            for pod in (p for p in left if p["metadata"]["labels"]["ray.io/cluster"] != active):
                state = {"terminated": {"reason": "Error", "exitCode": 1}}
                status = {"phase": "Failed", "containerStatuses": [{"name": "ray-worker", "ready": False, "state": state}]}
                cluster.api.update(POD, {**pod, "status": status}, manager="kubelet", subresource="status")
                ended += 1
            cluster.reconcile()
        told.add(cluster.condition("PoolsReady")[1])
    assert ended, "pods of the old cluster were seen ending"
    assert "CrashLoop" not in told
    assert cluster.condition("Ready") == ("True", "Ready")


def test_what_holds_a_new_revision_back_is_in_readys_message_the_one_that_kubectl_shows(cluster: Cluster) -> None:
    cluster.run()
    cluster.kuberay.broken_images.add("antiphon/worker:broken")
    cluster.edit(lambda s: s.update(kubernetes={"image": "antiphon/worker:broken"}))
    cluster.run(6)
    assert cluster.condition("Ready") == ("False", "NewRevision")
    assert "CrashLoopBackOff" in cluster.message("Ready")


def test_an_unknown_status_is_progress(cluster: Cluster) -> None:
    cluster.kuberay.application_status = "REBALANCING"
    cluster.run(8)
    assert cluster.condition("Ready") == ("False", "Initializing")


def test_suspending_stops_everything_and_resuming_brings_it_back(cluster: Cluster) -> None:
    cluster.run()
    cluster.edit(lambda s: s.update(suspend=True))
    cluster.run()
    assert cluster.condition("Ready") == ("False", "Suspended")
    assert cluster.api.list(POD, "default").items == ()
    cluster.edit(lambda s: s.update(suspend=False))
    cluster.run()
    assert cluster.condition("Ready") == ("True", "Ready")


def test_a_foreign_ray_service_is_not_adopted(cluster: Cluster) -> None:
    cluster.api.create(RAY_SERVICE, {"metadata": {"name": "demo", "namespace": "default"}, "spec": {"x": 1}})
    cluster.reconcile()
    assert cluster.condition("Accepted") == ("False", "NameConflict")
    assert cluster.ray_service["spec"] == {"x": 1}


@pytest.mark.parametrize(
    ("resource", "name"),
    [(SERVICE, "demo-http"), (DISRUPTION_BUDGET, "demo-ffn"), (NETWORK_POLICY, "demo-pods"), (SERVING_POOL, "demo-ffn")],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_no_child_of_a_foreign_owner_is_adopted(cluster: Cluster, resource: Resource, name: str) -> None:
    # It has none of our labels and nothing that a server-side apply would conflict with.
    foreign = cluster.api.create(resource, {"metadata": {"name": name, "namespace": "default"}, "spec": {}}, manager="other")
    cluster.run(4)
    assert cluster.condition("Accepted") == ("False", "NameConflict")
    assert cluster.api.get(resource, "default", name) == foreign


def test_an_invalid_document_is_refused_with_the_field() -> None:
    cluster = Cluster()
    cluster.create({**spec(), "topology": "monolith"})
    cluster.reconcile()
    assert cluster.condition("Accepted") == ("False", "InvalidSpec")
    assert "monolith" in cluster.message("Accepted")


def test_a_drain_takes_one_worker_of_a_pool_at_a_time_whatever_its_size() -> None:
    cluster = Cluster()
    cluster.create(external(gpuBudget=20))
    for replicas in (1, 3, 2):
        cluster.run(4)
        scale(cluster, replicas)
        cluster.run(90)
        budget = cluster.api.get(DISRUPTION_BUDGET, "default", "demo-attention")
        assert budget is not None
        # Of a RayCluster's pods the API server counts with a whole minAvailable only: it has no scale subresource.
        assert set(budget["spec"]) == {"minAvailable", "selector"}
        pods = cluster.api.list(POD, "default", budget["spec"]["selector"]["matchLabels"]).items
        assert len(pods) == replicas
        assert len(pods) - budget["spec"]["minAvailable"] == 1


def external(**extra: Any) -> dict[str, Any]:
    made = spec(**extra)
    made["pools"][0]["scaling"] = {"mode": "External", "minReplicas": 1, "maxReplicas": 6}
    return made


def scale(cluster: Cluster, replicas: int) -> None:
    cluster.api.merge_patch(SERVING_POOL, "default", "demo-attention", {"spec": {"replicas": replicas}}, manager="kubectl")


def pool_of(cluster: Cluster, name: str = "demo-attention") -> dict[str, Any]:
    found = cluster.api.get(SERVING_POOL, "default", name)
    assert found is not None
    return found


def test_an_external_pool_is_seeded_once_and_then_left_to_others() -> None:
    cluster = Cluster()
    cluster.create(external())
    cluster.run()
    assert pool_of(cluster)["spec"]["replicas"] == 2
    scale(cluster, 4)
    cluster.run()
    assert pool_of(cluster)["spec"]["replicas"] == 4
    assert cluster.live["status"]["summary"] == "attn 4/4, ffn 2/2"
    cluster.edit(lambda s: s.update(scheduler={"maxNumSeqs": 8}))
    cluster.run()
    assert pool_of(cluster)["spec"]["replicas"] == 4


def test_growing_is_no_degradation_but_a_worker_lost_is_until_it_is_back() -> None:
    cluster = Cluster()
    cluster.create(external())
    cluster.run()

    def seen() -> list[tuple[str, str]]:
        found = []
        for _ in range(8):
            cluster.run(1)
            found.append((cluster.live["status"]["summary"], cluster.condition("Degraded")[0]))
        return found

    scale(cluster, 4)
    growing = seen()
    assert {degraded for _, degraded in growing} == {"False"}
    assert growing[0][0] == "attn 2/4, ffn 2/2"
    assert growing[-1][0] == "attn 4/4, ffn 2/2"
    lost = next(p["metadata"]["name"] for p in cluster.api.list(POD, "default").items if "attention" in p["metadata"]["name"])
    cluster.api.delete(POD, "default", lost)
    back = seen()
    assert {degraded for summary, degraded in back if summary.startswith("attn 3/4")} == {"True"}
    assert back[-1] == ("attn 4/4, ffn 2/2", "False")


def test_growing_into_a_crash_loop_is_a_degradation() -> None:
    cluster = Cluster()
    cluster.create(external())
    cluster.run()
    scale(cluster, 3)
    cluster.kuberay.broken_images.add("antiphon/worker:1")
    cluster.run()
    assert cluster.condition("PoolsReady") == ("False", "CrashLoop")
    assert cluster.condition("Degraded") == ("True", "DeploymentUnhealthy")


def test_a_pool_that_wakes_is_not_ready_before_a_worker_is_and_is_available_throughout() -> None:
    cluster = Cluster()
    made = spec()
    for pool in made["pools"]:
        pool["scaling"] = {"mode": "External", "minReplicas": 0, "maxReplicas": 4, "scaleDownWindowS": 10}
    cluster.create(made)
    cluster.run()

    def to(replicas: int) -> list[tuple[str, str, str]]:
        for name in ("demo-attention", "demo-ffn"):
            cluster.api.merge_patch(SERVING_POOL, "default", name, {"spec": {"replicas": replicas}}, manager="kubectl")
        found = []
        for _ in range(20):
            cluster.run(1)
            found.append((cluster.live["status"]["summary"], cluster.condition("Ready")[0], cluster.condition("Available")[0]))
        return found

    assert to(0)[-1] == ("attn 0/0, ffn 0/0", "True", "True")
    assert cluster.condition("Ready") == ("True", "ScaledToZero")
    waking = to(2)
    assert ("attn 0/2, ffn 0/2", "False", "True") in waking
    assert ("attn 0/2, ffn 0/2", "True", "True") not in waking
    assert {available for _, _, available in waking} == {"True"}
    assert cluster.condition("Available") == ("True", "Ready")
    to(0)
    cluster.kuberay.broken_images.add("antiphon/worker:1")
    to(2)
    assert cluster.condition("Available")[0] == "False", "nobody is going to answer"


def test_going_from_static_to_external_keeps_the_size() -> None:
    cluster = Cluster()
    cluster.create(spec())
    cluster.run()
    cluster.edit(lambda s: s["pools"][0].update(scaling={"mode": "External", "minReplicas": 1, "maxReplicas": 6}))
    cluster.run()
    assert pool_of(cluster)["spec"]["replicas"] == 2
    cluster.edit(lambda s: s["pools"][0].update(scaling={"mode": "Static"}, replicas=1))
    cluster.run()
    assert pool_of(cluster)["spec"]["replicas"] == 1


def test_the_budget_bounds_what_scale_asks_for() -> None:
    cluster = Cluster()
    made = external(gpuBudget=8)
    made["pools"][1]["scaling"] = {"mode": "External", "minReplicas": 2, "maxReplicas": 6}
    cluster.create(made)
    cluster.run()
    scale(cluster, 6)
    cluster.api.merge_patch(SERVING_POOL, "default", "demo-ffn", {"spec": {"replicas": 6}}, manager="kubectl")
    cluster.run()
    limited = {c["type"]: c for c in pool_of(cluster)["status"]["conditions"]}["ScalingLimited"]
    assert (limited["status"], limited["reason"]) == ("True", "GpuBudget")
    assert cluster.kuberay.max_gpus_seen <= 8


def test_another_managers_field_is_not_taken(cluster: Cluster) -> None:
    cluster.run()
    cluster.api.apply(
        SERVICE,
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "demo-http", "namespace": "default"},
            "spec": {"type": "LoadBalancer"},
        },
        manager="somebody",
        force=True,
    )
    cluster.run(2)
    service = cluster.api.get(SERVICE, "default", "demo-http")
    assert service is not None
    assert service["spec"]["type"] == "LoadBalancer"
    assert cluster.condition("Degraded") == ("True", "FieldConflict")
    assert cluster.condition("Ready") == ("False", "FieldConflict"), "what was asked for is not applied"
    assert "spec.type" in cluster.message("Ready").replace("f:", "").replace("{", "")


def owned_by_kuberay(cluster: Cluster) -> bool:
    return any(
        entry["manager"] == "kuberay-operator"
        and entry["operation"] == "Update"
        and "f:workerGroupSpecs" in entry["fieldsV1"].get("f:spec", {}).get("f:rayClusterConfig", {})
        for entry in cluster.ray_service["metadata"]["managedFields"]
    )


def test_after_kuberays_write_of_the_whole_object_scale_rollout_and_suspend_are_applied() -> None:
    cluster = Cluster()
    cluster.create(external())
    cluster.run()
    assert owned_by_kuberay(cluster), "the stand-in writes as the real one"
    assert all(g["scaleStrategy"] == {} and g["priority"] == 0 for g in groups(cluster))
    scale(cluster, 4)
    cluster.run()
    assert cluster.live["status"]["summary"] == "attn 4/4, ffn 2/2"
    cluster.edit(lambda s: s.update(kubernetes={"image": "antiphon/worker:next"}))
    cluster.run(25)
    assert {g["template"]["spec"]["containers"][0]["image"] for g in groups(cluster)} == {"antiphon/worker:next"}
    assert cluster.condition("Ready") == ("True", "Ready")
    assert cluster.condition("Degraded") == ("False", "Healthy")
    cluster.edit(lambda s: s.update(suspend=True))
    cluster.run()
    assert cluster.condition("Ready") == ("False", "Suspended")
    assert cluster.api.list(POD, "default").items == ()


def groups(cluster: Cluster) -> list[dict[str, Any]]:
    return list(cluster.ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"])


def test_what_the_api_server_refuses_is_told_in_ready_within_a_minute(cluster: Cluster) -> None:
    cluster.run()

    def denied(call: Call) -> KubeError | None:
        text = 'admission webhook "policy.example" denied the request: no more pods here'
        return error_of(403, text) if call.writes and call.resource == "rayservices" else None

    cluster.api.faults.append(denied)
    cluster.edit(lambda s: s["pools"][0].update(replicas=3))
    again = cluster.reconcile()
    assert cluster.condition("Ready") == ("False", "ApplyRefused")
    assert "no more pods here" in cluster.message("Ready")
    assert cluster.condition("Available") == ("True", "Ready")
    assert again is not None
    assert again <= 60
    cluster.api.faults.clear()
    cluster.run()
    assert cluster.condition("Ready") == ("True", "Ready")
    assert cluster.live["status"]["summary"] == "attn 3/3, ffn 2/2"


def test_a_smaller_size_inside_the_window_says_until_when_the_present_one_is_kept() -> None:
    cluster = Cluster()
    cluster.create(external())
    cluster.run()
    scale(cluster, 1)
    cluster.run(3)
    limited = {c["type"]: c for c in pool_of(cluster)["status"]["conditions"]}["ScalingLimited"]
    assert (limited["status"], limited["reason"]) == ("True", "ScaleDownWindow")
    assert limited["message"].startswith("1 wanted, 2 kept until 20")
    cluster.run(5, step_s=100)
    limited = {c["type"]: c for c in pool_of(cluster)["status"]["conditions"]}["ScalingLimited"]
    assert limited["reason"] == "NotLimited"
    assert cluster.live["status"]["summary"] == "attn 1/1, ffn 2/2"


def test_workers_that_have_ended_are_not_counted_and_are_named(cluster: Cluster) -> None:
    cluster.run()
    for pod in cluster.api.list(POD, "default").items:
        if pod["metadata"]["labels"]["serving.antiphon.dev/pool"] == "ffn":
            # The kubelet's last word on Ready may come late, or never.
            ended = [{"name": "ray-worker", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}]
            status = {**pod["status"], "containerStatuses": ended}
            cluster.api.update(POD, {**pod, "status": status}, manager="kubelet", subresource="status")
    cluster.reconcile()
    assert cluster.live["status"]["summary"] == "attn 2/2, ffn 0/2"
    assert cluster.condition("Ready")[0] == "False"
    assert "OOMKilled, exit code 137" in cluster.message("PoolsReady")


def test_events_have_messages_and_a_start_is_no_cause_for_warnings(cluster: Cluster) -> None:
    cluster.run()
    events = cluster.api.list(EVENT, "default").items
    assert all(not event["message"].rstrip().endswith(":") for event in events)
    assert [event["message"] for event in events if event["type"] == "Warning"] == []
    cluster.kuberay.unhealthy["pool-ffn"] = "UNHEALTHY"
    cluster.run(3)
    assert any(e["type"] == "Warning" and "pool-ffn" in e["message"] for e in cluster.api.list(EVENT, "default").items)


def test_a_pool_with_too_little_memory_is_refused_with_the_figures_and_nothing_starts() -> None:
    cluster = Cluster()
    made = spec()
    made["pools"][0] = {"name": "attention", "role": "attention", "resources": {"memory": "1Gi"}}
    made["pools"][1] = {"name": "ffn", "role": "ffn"}
    cluster.create(made)
    cluster.run(3)
    assert cluster.condition("Accepted") == ("False", "InsufficientMemory")
    assert cluster.live["status"]["model"] == "smol", "the columns of kubectl get are known all the same"
    told = cluster.message("Accepted")
    assert told.startswith("spec.pools[0].resources.memory: 1Gi")
    assert "KV cache 1.00 + runtime" in told
    assert "spec.cache.memory" in told
    assert cluster.api.list(RAY_SERVICE, "default").items == ()
    cluster.edit(lambda s: s.update(cache={"memory": "64Mi"}) or s["pools"][0].update(resources={"memory": "2Gi"}))
    cluster.run()
    assert cluster.condition("Ready") == ("True", "Ready")


def gateway(cluster: Cluster) -> None:
    parents = [{"name": "public", "namespace": "gateways"}]
    cluster.edit(lambda s: s.update(kubernetes={"gateway": {"parentRefs": parents, "hostnames": ["models.example.org"]}}))


def test_gateways_that_the_document_names_lead_to_it_until_they_are_taken_out(cluster: Cluster) -> None:
    cluster.run()
    before = cluster.ray_service["spec"]
    gateway(cluster)
    cluster.run(4)
    route = cluster.api.get(HTTP_ROUTE, "default", "demo-http")
    assert route is not None
    assert route["spec"]["parentRefs"] == [{"name": "public", "namespace": "gateways"}]
    assert route["spec"]["hostnames"] == ["models.example.org"]
    (rule,) = route["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": "demo-http", "port": 8000}]
    assert rule["timeouts"] == {"request": "600s"}
    assert cluster.ray_service["spec"] == before, "no pod is replaced for a route"
    assert cluster.condition("Ready") == ("True", "Ready")
    cluster.edit(lambda s: s.update(kubernetes={}))
    cluster.run(4)
    assert cluster.api.get(HTTP_ROUTE, "default", "demo-http") is None


def test_somebody_elses_edit_of_a_route_is_told_with_the_next_look_which_takes_two_reads_more(cluster: Cluster) -> None:
    gateway(cluster)
    cluster.edit(lambda s: s["kubernetes"]["gateway"].update(inferencePool=True))
    cluster.run()
    cluster.api.calls.clear()
    assert cluster.reconcile() == 600.0
    assert (len(cluster.api.calls), cluster.writes()) == (12, [])
    route = cluster.api.get(HTTP_ROUTE, "default", "demo-http")
    assert route is not None
    route["spec"]["parentRefs"] = [{"name": "elsewhere"}]
    cluster.api.update(HTTP_ROUTE, route, manager="somebody")
    cluster.reconcile()
    assert cluster.condition("Ready") == ("False", "FieldConflict")
    assert "HTTPRoute demo-http" in cluster.message("Ready")
    assert cluster.condition("Available")[0] == "True"


def test_an_inference_pool_leads_to_the_replicas_and_their_picker_until_it_is_taken_out(cluster: Cluster) -> None:
    cluster.run()
    gateway(cluster)
    cluster.edit(lambda s: s["kubernetes"]["gateway"].update(inferencePool=True))
    cluster.run(8)
    pool = cluster.api.get(INFERENCE_POOL, "default", "demo-gateways")
    assert pool is not None
    picker = pool["spec"]["endpointPickerRef"]
    service = cluster.api.get(SERVICE, "default", picker["name"])
    assert service is not None
    assert service["spec"]["ports"][0]["port"] == picker["port"]["number"]
    replicas = cluster.api.get(SERVICE, "default", "demo-replicas")
    assert replicas is not None
    assert (replicas["spec"]["clusterIP"], replicas["spec"]["selector"]) == ("None", pool["spec"]["selector"]["matchLabels"])
    route = cluster.api.get(HTTP_ROUTE, "default", "demo-http")
    assert route is not None
    backend = {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "demo-gateways"}
    assert route["spec"]["rules"][0]["backendRefs"] == [backend]
    (application,) = yaml.safe_load(cluster.ray_service["spec"]["serveConfigV2"])["applications"]
    assert application["args"]["document"]["spec"]["endpoint"]["pickerTargets"] == "demo-replicas.default.svc:8000"
    assert cluster.condition("Ready") == ("True", "Ready")
    cluster.edit(lambda s: s.update(kubernetes={}))
    cluster.run(8)
    assert cluster.api.get(INFERENCE_POOL, "default", "demo-gateways") is None
    assert cluster.api.get(SERVICE, "default", "demo-replicas") is None


def test_without_the_gateway_api_that_is_told_and_serving_goes_on(cluster: Cluster) -> None:
    cluster.run()
    cluster.api.faults.append(lambda call: NotFound("no such kind") if call.resource == "httproutes" and call.writes else None)
    gateway(cluster)
    cluster.run(2)
    assert cluster.condition("Ready") == ("False", "GatewayApiMissing")
    assert cluster.condition("Available") == ("True", "Ready")


def test_a_child_deleted_by_hand_comes_back(cluster: Cluster) -> None:
    cluster.run()
    cluster.api.delete(SERVICE, "default", "demo-grpc")
    cluster.reconcile()
    assert cluster.api.get(SERVICE, "default", "demo-grpc") is not None


def test_deleting_the_document_leaves_nothing_and_needs_no_finalizer(cluster: Cluster) -> None:
    cluster.run()
    assert "finalizers" not in cluster.live["metadata"]
    cluster.api.delete(LLM_DEPLOYMENT, "default", "demo")
    assert cluster.reconcile() is None
    for _ in range(3):
        cluster.kuberay.tick()  # its own finalizer holds the RayService until the clusters are gone
    for resource in (RAY_SERVICE, RAY_CLUSTER, POD, SERVICE, SERVING_POOL, CONTROLLER_REVISION):
        assert cluster.api.list(resource, "default").items == ()


def test_one_event_per_change(cluster: Cluster) -> None:
    cluster.run()
    ready = [e for e in cluster.api.list(EVENT, "default").items if e["message"].startswith("Ready is True")]
    assert len(ready) == 1
    count = len(cluster.api.list(EVENT, "default").items)
    cluster.run(3)
    assert len(cluster.api.list(EVENT, "default").items) == count


def test_a_newer_operator_changes_nothing_that_runs(cluster: Cluster) -> None:
    cluster.run()
    before = cluster.ray_service["spec"]
    cluster.settings = Settings(runtime=Runtime(image="antiphon/worker:2", ray_version="2.61.0"))
    cluster.run(4)
    assert cluster.ray_service["spec"] == before


def test_an_artifact_that_is_loading_is_waited_for(cluster: Cluster) -> None:
    artifact = {"metadata": {"name": "smol", "namespace": "default"}, "spec": {"uri": "/models/smol"}}
    made = cluster.api.create(MODEL_ARTIFACT, artifact)
    cluster.run(3)
    assert cluster.condition("ModelReady") == ("False", "Downloading")
    assert cluster.condition("Ready") == ("False", "Initializing")
    assert cluster.condition("Stalled")[0] == "False"
    assert cluster.api.list(RAY_SERVICE, "default").items == ()
    cluster.api.update(MODEL_ARTIFACT, {**made, "status": {"phase": "Cached"}}, manager="x", subresource="status")
    cluster.run()
    assert cluster.condition("Ready") == ("True", "Ready")
    assert "/models/smol/artifacts/smol" in cluster.ray_service["spec"]["serveConfigV2"]


def test_a_running_deployment_serves_on_until_another_models_weights_are_there(cluster: Cluster) -> None:
    """Its new pods came up beside it before the download had ended, failed, and were given up."""
    cluster.run()
    before = cluster.ray_service["spec"]
    artifact = {"metadata": {"name": "large", "namespace": "default"}, "spec": {"uri": "hf://a/large", "revision": "v1"}}
    made = cluster.api.create(MODEL_ARTIFACT, artifact)
    cluster.edit(lambda s: s["model"].update(uri="hf://a/large", revision="v1"))
    cluster.run(400)  # longer than a rollout may stand still
    assert cluster.ray_service["spec"] == before
    assert cluster.condition("ModelReady") == ("False", "Downloading")
    assert cluster.condition("Available") == ("True", "Ready")
    assert cluster.condition("Ready") == ("False", "NewRevision")
    assert "waiting for its weights: ModelArtifact large" in cluster.message("Ready")
    assert cluster.condition("Stalled")[0] == "False"
    cluster.api.update(MODEL_ARTIFACT, {**made, "status": {"phase": "Cached"}}, manager="x", subresource="status")
    cluster.run()
    assert cluster.condition("Ready") == ("True", "Ready")
    assert "artifacts/large" in cluster.ray_service["spec"]["serveConfigV2"]


def test_model_and_url_are_told_while_the_weights_are_still_coming(cluster: Cluster) -> None:
    """Both columns of ``kubectl get`` stood empty for the minutes of a download."""
    cluster.api.create(MODEL_ARTIFACT, {"metadata": {"name": "smol", "namespace": "default"}, "spec": {"uri": "/models/smol"}})
    cluster.reconcile()
    status = cluster.live["status"]
    assert cluster.condition("ModelReady") == ("False", "Downloading")
    assert (status["model"], status["url"]) == ("smol", "http://demo-http.default.svc:8000/v1")


def test_model_ready_follows_the_artifact_while_the_document_is_refused(cluster: Cluster) -> None:
    artifact = {"metadata": {"name": "smol", "namespace": "default"}, "spec": {"uri": "/models/smol"}}
    made = cluster.api.create(MODEL_ARTIFACT, artifact)
    cluster.run(2)
    cluster.edit(lambda s: s.update(kubernetes={"rayVersion": "1.0.0"}))
    cluster.run(2)
    assert cluster.condition("Ready") == ("False", "UnsupportedRayVersion")
    assert cluster.condition("ModelReady") == ("False", "Downloading")
    cluster.api.update(MODEL_ARTIFACT, {**made, "status": {"phase": "Cached"}}, manager="x", subresource="status")
    cluster.run(2)
    assert cluster.condition("Ready") == ("False", "UnsupportedRayVersion")
    assert cluster.condition("ModelReady") == ("True", "Cached")


@pytest.mark.parametrize("error", [Conflict("busy"), Throttled("slow", 3.0), ServerFault("oops")], ids=lambda e: type(e).__name__)
def test_a_failing_api_server_is_survived(cluster: Cluster, error: KubeError) -> None:
    count = 0

    def now_and_then(call: Call) -> KubeError | None:
        nonlocal count
        count += 1
        return error if count % 17 == 0 and (call.writes or not isinstance(error, Conflict)) else None

    cluster.api.faults.append(now_and_then)
    for _ in range(50):
        with contextlib.suppress(KubeError):
            cluster.reconcile()
        cluster.kuberay.tick()
        cluster.now_s += 5
    cluster.api.faults.clear()
    cluster.run(8)
    assert cluster.condition("Ready") == ("True", "Ready")


def end_state(cluster: Cluster) -> tuple[Any, ...]:
    service = cluster.ray_service
    pods = sorted(p["metadata"]["labels"]["ray.io/group"] for p in cluster.api.list(POD, "default").items)
    return service["spec"], cluster.live["status"]["summary"], cluster.condition("Ready"), cluster.condition("Progressing"), pods


def nothing(cluster: Cluster) -> None:
    cluster.now_s += 5


def change_pods_and_serve(cluster: Cluster) -> None:
    cluster.run()
    cluster.edit(lambda s: s["pools"][0].update(env={"A": "1"}) or s.update(scheduler={"maxNumSeqs": 8}))


def break_the_image(cluster: Cluster) -> None:
    cluster.run()
    cluster.kuberay.broken_images.add("broken")
    cluster.edit(lambda s: s.update(kubernetes={"image": "broken"}))


def suspend_and_shrink(cluster: Cluster) -> None:
    cluster.run()
    cluster.edit(lambda s: s.update(suspend=True, pools=[*s["pools"][:1], {**s["pools"][1], "replicas": 2}]))


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A document, what happens to it before the first write that counts, and the passes that it takes from there."""

    budget: int
    begin: Callable[[Cluster], None]
    passes: int = 25
    strategy: str = "Surge"

    def run(self, kill_after: int | None) -> tuple[Cluster, bool]:
        """The world in the end, and whether the operator was killed: after that many writes, before the next."""
        cluster = Cluster()
        cluster.create(external(gpuBudget=self.budget, rollout={"strategy": self.strategy, "progressDeadlineS": 60}))
        self.begin(cluster)
        writes, killed = 0, False

        def kill(call: Call) -> KubeError | None:
            nonlocal writes, killed
            if call.writes and kill_after is not None and not killed:
                writes += 1
                if writes > kill_after:
                    killed = True
                    raise Killed
            return None

        cluster.api.faults.append(kill)
        for _ in range(self.passes):
            with contextlib.suppress(Killed):
                cluster.reconcile()
            cluster.kuberay.tick()
            cluster.now_s += 5
        return cluster, killed

    def converges(self, kill_after: int, expected: tuple[Any, ...]) -> bool:
        """Kill after that many writes; False when the rollout has fewer."""
        cluster, killed = self.run(kill_after)
        assert end_state(cluster) == expected, f"killed after {kill_after} writes"
        assert cluster.kuberay.max_gpus_seen <= self.budget
        return killed


SURGE = Rollout(budget=12, begin=change_pods_and_serve)
ROLLOUTS = {
    "the first": Rollout(budget=12, begin=nothing),
    "Surge": SURGE,
    "Recreate": Rollout(budget=8, begin=change_pods_and_serve, strategy="Recreate"),
    "rolled back": Rollout(budget=12, begin=break_the_image, passes=50),
    "suspended": Rollout(budget=12, begin=suspend_and_shrink),
}


@pytest.fixture(scope="module")
def undisturbed() -> tuple[Any, ...]:
    return end_state(SURGE.run(None)[0])


@pytest.mark.parametrize("kill_after", sorted(random.Random(7).sample(range(20), 4)))
def test_killed_after_some_write_of_a_rollout_it_converges_to_the_same_end(kill_after: int, undisturbed: tuple[Any, ...]) -> None:
    assert SURGE.converges(kill_after, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif("ANTIPHON_ALL_KILLS" not in os.environ, reason="every write in turn, minutes: ANTIPHON_ALL_KILLS=1 asks for it")
@pytest.mark.parametrize("name", ROLLOUTS)
def test_killed_after_any_write_of_a_rollout_it_converges_to_the_same_end(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    expected = end_state(ROLLOUTS[name].run(None)[0])
    kill_after = 0
    while ROLLOUTS[name].converges(kill_after, expected):
        kill_after += 1
    record_property("kill points", kill_after)
    print(f"{name}: {kill_after} kill points")
    assert kill_after > 20


@pytest.mark.parametrize("version", ["2.9.0", "3.0.0"])
def test_an_unsupported_version_of_ray_is_refused_and_what_runs_is_left_alone(cluster: Cluster, version: str) -> None:
    cluster.run()
    before = cluster.ray_service
    cluster.edit(lambda s: s.update(kubernetes={"rayVersion": version}))
    cluster.run(3)
    assert cluster.condition("Accepted") == ("False", "UnsupportedRayVersion")
    assert version in cluster.message("Accepted")
    assert cluster.condition("Stalled") == ("True", "UnsupportedRayVersion")
    assert cluster.condition("Ready") == ("False", "UnsupportedRayVersion")
    assert cluster.condition("Available") == ("True", "Ready")
    assert cluster.ray_service == before
    cluster.edit(lambda s: s.update(kubernetes={"rayVersion": "2.60.1"}))
    cluster.run()
    assert cluster.condition("Accepted") == ("True", "Accepted")


def test_a_kuberay_without_suspend_serves_and_says_so_where_it_is_needed(cluster: Cluster) -> None:
    cluster.api.undeclared.add(("rayservices", "suspend"))
    cluster.run()
    assert cluster.condition("Ready") == ("True", "Ready")
    cluster.edit(lambda s: s.update(suspend=True))
    cluster.run()
    assert cluster.condition("Accepted") == ("False", "UnsupportedKubeRay")
    assert "spec.suspend" in cluster.message("Accepted")
    assert "1.7" in cluster.message("Accepted")
    assert cluster.condition("Available") == ("True", "Ready")
    cluster.edit(lambda s: s.pop("suspend"))
    cluster.run()
    assert cluster.condition("Accepted") == ("True", "Accepted")
    assert cluster.condition("Ready") == ("True", "Ready")


@pytest.mark.parametrize("change", [{"kubernetes": {"image": "antiphon/worker:next"}}, {"scheduler": {"maxNumSeqs": 8}}])
def test_stages_of_a_new_revision_are_its_own_and_not_what_the_one_before_had_passed(cluster: Cluster, change: Any) -> None:
    """All four were passed after 0 s in the pass that applied it: the old pods ran."""
    cluster.run()
    cluster.edit(lambda s: s.update(change))
    cluster.reconcile()
    assert list(cluster.live["status"]["stages"]) == ["started"]
    applied_s = cluster.now_s
    cluster.run()
    stages = cluster.live["status"]["stages"]
    assert list(stages) == ["started", "scheduled", "imagePulled", "weightsReady", "engineReady"]
    assert seconds(stages["engineReady"]) >= applied_s + 10


def test_stages_of_a_start_are_timed_once_each(cluster: Cluster) -> None:
    told: list[tuple[str, float]] = []
    reconciler = LLMReconciler(
        MemoryKube(cluster.api), SETTINGS, clock=lambda: cluster.now_s, on_stage=lambda stage, took_s: told.append((stage, took_s))
    )
    for _ in range(20):
        asyncio.run(reconciler.reconcile("default", "demo"))
        cluster.kuberay.tick()
        cluster.now_s += 5
    stages = cluster.live["status"]["stages"]
    order = ["started", "scheduled", "imagePulled", "weightsReady", "engineReady"]
    assert [stages[name] for name in order] == sorted(stages.values())
    assert sorted(name for name, _ in told) == sorted(order[1:])
    assert all(took_s > 0 and took_s % 5 == 0 for _, took_s in told)


async def test_log_lines_carry_generation_and_revision_also_those_of_failures(cluster: Cluster) -> None:
    for _ in range(20):
        await LLMReconciler(MemoryKube(cluster.api), SETTINGS, clock=lambda: cluster.now_s).reconcile("default", "demo")
        cluster.kuberay.tick()
    revision = cluster.live["status"]["revision"]
    cluster.edit(lambda s: s["endpoint"].update(httpPort=8001) if "endpoint" in s else s.update(endpoint={"httpPort": 8001}))
    cluster.api.faults.append(lambda call: ServerFault("oops") if call.writes else None)
    lines: list[dict[str, Any]] = []
    handler = logging.Handler()
    formatter = JsonFormatter()
    handler.emit = lambda record: lines.append(json.loads(formatter.format(record)))  # type: ignore[method-assign]
    logger = logging.getLogger("antiphon_operator")
    logger.addHandler(handler)
    reconciler = LLMReconciler(MemoryKube(cluster.api), SETTINGS, clock=lambda: cluster.now_s)
    passed = asyncio.Event()
    queue: WorkQueue[tuple[str, str]] = WorkQueue(lambda key: reconciler.reconcile(*key), on_pass=lambda key, done: passed.set())
    running = asyncio.create_task(queue.run())
    queue.add(("default", "demo"))
    try:
        async with asyncio.timeout(10):
            await passed.wait()
    finally:
        running.cancel()
        logger.removeHandler(handler)
        await asyncio.wait((running,))
    (failed,) = [line for line in lines if line["message"].startswith("reconcile failed")]
    assert (failed["object"], failed["generation"]) == ("LLMDeployment/default/demo", "2")
    assert failed["revision"] != revision, "the revision being brought in is meant"


def drafting() -> dict[str, Any]:
    return {"drafter": "model", "model": {"deploymentRef": "small"}}


def small(cluster: Cluster, uri: str = "hf://a/small", **model: Any) -> dict[str, Any]:
    value = {"model": {"uri": uri, **model}, "pools": [{"name": "monolith", "role": "monolith"}], "suspend": True}
    return cluster.api.create(LLM_DEPLOYMENT, {"metadata": {"name": "small", "namespace": "default"}, "spec": value})


def containers(cluster: Cluster) -> dict[str, dict[str, str]]:
    """Claims by mount path, for each worker group."""
    found = {}
    for group in cluster.ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
        mounts = pod["containers"][0]["volumeMounts"]
        found[group["groupName"]] = {m["mountPath"]: claims[m["name"]] for m in mounts if m["name"] in claims}
    return found


def test_a_draft_model_that_names_a_deployment_is_fetched_from_where_that_ones_weights_are(cluster: Cluster) -> None:
    """Whether the other one runs does not matter; only workers that generate have its claim."""
    small(cluster, revision="v1")
    artifact = {"metadata": {"name": "drafts", "namespace": "default"}, "spec": {"uri": "hf://a/small", "revision": "v1"}}
    made = cluster.api.create(MODEL_ARTIFACT, artifact)
    cluster.edit(lambda s: s.update(speculation=drafting()))
    cluster.run(3)
    assert cluster.condition("ModelReady") == ("False", "Downloading")
    assert cluster.message("ModelReady").startswith("draft model: ModelArtifact drafts")
    assert cluster.api.list(RAY_SERVICE, "default").items == ()
    cluster.api.update(MODEL_ARTIFACT, {**made, "status": {"phase": "Cached"}}, manager="x", subresource="status")
    cluster.run()
    assert cluster.condition("Ready") == ("True", "Ready")
    (application,) = yaml.safe_load(cluster.ray_service["spec"]["serveConfigV2"])["applications"]
    document = application["args"]["document"]["spec"]
    assert document["model"]["uri"] == "/models/smol"
    assert document["speculation"]["model"] == {"uri": "/models/drafts/artifacts/drafts", "revision": "v1"}
    assert containers(cluster) == {"attention": {"/models/drafts": "drafts"}, "ffn": {}, "gateway": {}}


def test_another_checkpoint_of_the_deployment_that_drafts_is_a_new_revision(cluster: Cluster) -> None:
    value = small(cluster, "pvc://disk/small/1")
    cluster.edit(lambda s: s.update(speculation=drafting()))
    cluster.run()
    before = cluster.live["status"]["revision"]
    value["spec"] |= {"model": {"uri": "pvc://disk/small/1", "name": "anything"}, "suspend": False}
    value = cluster.api.update(LLM_DEPLOYMENT, value, manager="kubectl")
    cluster.run()
    assert cluster.live["status"]["revision"] == before, "what does not draft makes no revision"
    value["spec"]["model"]["uri"] = "pvc://disk/small/2"
    cluster.api.update(LLM_DEPLOYMENT, value, manager="kubectl")
    cluster.run()
    assert cluster.live["status"]["revision"] != before
    assert "/models/disk/small/2" in cluster.ray_service["spec"]["serveConfigV2"]
    assert cluster.condition("Ready") == ("True", "Ready")


def test_a_claim_that_model_and_draft_model_share_is_mounted_once(cluster: Cluster) -> None:
    cluster.edit(lambda s: s.update(model={"uri": "pvc://disk/large", "name": "smol"}))
    cluster.edit(lambda s: s.update(speculation={"drafter": "model", "model": {"uri": "pvc://disk/small"}}))
    cluster.run()
    assert containers(cluster) == {group: {"/models/disk": "disk"} for group in ("attention", "ffn", "gateway")}
    assert "/models/disk/small" in cluster.ray_service["spec"]["serveConfigV2"]


def test_a_draft_model_that_can_t_be_had_is_told_and_what_runs_goes_on(cluster: Cluster) -> None:
    cluster.run()
    running = cluster.ray_service["spec"]
    cluster.edit(lambda s: s.update(speculation=drafting()))
    cluster.run(2)
    assert cluster.condition("Accepted") == ("False", "ReferenceNotFound")
    assert cluster.message("Accepted").startswith("spec.speculation.model.deploymentRef: there is no LLMDeployment 'small'")
    small(cluster, task="embed")
    cluster.run(2)
    assert cluster.condition("Accepted") == ("False", "InvalidSpec")
    assert "it writes no text" in cluster.message("Accepted")
    assert cluster.ray_service["spec"] == running
