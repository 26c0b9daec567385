"""A composition with tiers: suspended deployments share the model pool of the router's pod."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from antiphon.apps.serve.deployment_set import Serving, serving_of
from antiphon.core.document.loading import parse_documents
from antiphon_operator.kube.resources import COMPOSITION, CONFIG_MAP, DEPLOYMENT, EVENT, LLM_DEPLOYMENT, MODEL_ARTIFACT, Resource
from antiphon_operator.reconcile.composition import TIERS_S, CompositionReconciler
from antiphon_operator.reconcile.tiers import TierSeen, tiers_in
from antiphon_operator.render.settings import Runtime, Settings
from antiphon_operator.testing.memory_api import MemoryApi
from antiphon_operator.testing.memory_kube import MemoryKube

SETTINGS = Settings(runtime=Runtime(image="w:1", ray_version="2.60.0"))
MEMBERS = ("chat", "code")


class Tiers:
    """What the model pool says of itself, when it is asked."""

    def __init__(self) -> None:
        self.seen: dict[str, TierSeen] = {}
        self.asked: list[str] = []

    async def read(self, url: str) -> Mapping[str, TierSeen]:
        self.asked.append(url)
        return self.seen


class World:
    def __init__(self) -> None:
        self.api = MemoryApi(clock=lambda: 1_700_000_000.0)
        self.tiers = Tiers()
        self._composition = CompositionReconciler(MemoryKube(self.api), SETTINGS, clock=lambda: 1_700_000_000.0, tiers=self.tiers)
        for name in MEMBERS:
            self.create(LLM_DEPLOYMENT, name, deployment(f"pvc://models/{name}"))
        self.create(LLM_DEPLOYMENT, "maths", {**deployment("hf://a/b"), "suspend": False})
        experts: list[dict[str, Any]] = [{"name": n, "deploymentRef": n, "memory": "1Gi"} for n in MEMBERS]
        experts.append({"name": "maths", "deploymentRef": "maths"})
        spec = {"experts": experts, "general": "chat", "tiers": {"residentMemory": "1Gi", "hostMemory": "2Gi"}}
        self.create(COMPOSITION, "team", spec)

    def create(self, resource: Resource, name: str, spec: dict[str, Any]) -> None:
        self.api.create(resource, {"metadata": {"name": name, "namespace": "default"}, "spec": spec})

    def edit(self, resource: Resource, name: str, **spec: Any) -> None:
        live = self.get(resource, name)
        self.api.update(resource, {**live, "spec": {**live["spec"], **spec}}, manager="x")

    def get(self, resource: Resource, name: str) -> dict[str, Any]:
        found = self.api.get(resource, "default", name)
        assert found is not None
        return found

    def reconcile(self) -> float | None:
        return asyncio.run(self._composition.reconcile("default", "team"))

    def start(self, ready: int = 1) -> None:
        live = self.get(DEPLOYMENT, "team-router")
        self.api.update(DEPLOYMENT, {**live, "status": {"readyReplicas": ready}}, manager="x", subresource="status")

    @property
    def pod(self) -> Any:
        return self.get(DEPLOYMENT, "team-router")["spec"]["template"]["spec"]

    @property
    def status(self) -> Any:
        return self.get(COMPOSITION, "team")["status"]

    def condition(self, kind: str) -> Any:
        return next(c for c in self.status["conditions"] if c["type"] == kind)


def deployment(uri: str) -> dict[str, Any]:
    return {
        "model": {"uri": uri, "name": uri.rsplit("/", 1)[1]},
        "topology": "monolith",
        "pools": [{"name": "workers", "role": "monolith"}],
        "cache": {"memory": "512Mi"},
        "suspend": True,
    }


@pytest.fixture
def world() -> World:
    return World()


def served(world: World) -> Serving:
    text = world.get(CONFIG_MAP, "team-router")["data"]["composition.yaml"]
    return serving_of(parse_documents(text, "test"), "test")


def test_the_pod_serves_what_a_laptop_serves_of_the_same_documents(world: World) -> None:
    world.reconcile()
    serving = served(world)
    (pool,) = serving.tier_pools
    assert [member.deployment for member in pool.members] == ["chat", "code"]
    assert [d.spec.model.uri for d in serving.deployments] == ["/models/models/chat", "/models/models/code"]
    elsewhere = serving.compositions[0].spec.expert("maths").external
    assert elsewhere is not None
    assert elsewhere.url == "http://maths-http.default.svc:8000/v1"
    (container,) = world.pod["containers"]
    assert container["args"][:2] == ["serve", "--no-ray"]


def test_weights_on_one_claim_are_mounted_once_and_copies_lie_in_memory(world: World) -> None:
    world.reconcile()
    claims = [v["persistentVolumeClaim"]["claimName"] for v in world.pod["volumes"] if "persistentVolumeClaim" in v]
    assert claims == ["models"]
    (shm,) = [v for v in world.pod["volumes"] if v["name"] == "shm"]
    assert int(shm["emptyDir"]["sizeLimit"]) >= 2 << 30
    assert shm["emptyDir"]["medium"] == "Memory"


def test_an_expert_that_drafts_with_another_deployment_has_its_weights_on_the_model_pool(world: World) -> None:
    drafting = {"drafter": "model", "model": {"deploymentRef": "small"}}
    world.edit(LLM_DEPLOYMENT, "code", speculation=drafting)
    world.reconcile()
    assert "LLMDeployment/code: spec.speculation.model.deploymentRef" in world.condition("Ready")["message"]
    world.create(LLM_DEPLOYMENT, "small", deployment("pvc://others/small"))
    world.reconcile()
    claims = [v["persistentVolumeClaim"]["claimName"] for v in world.pod["volumes"] if "persistentVolumeClaim" in v]
    assert claims == ["models", "others"]
    speculation = next(d.spec.speculation for d in served(world).deployments if d.metadata.name == "code")
    assert speculation is not None
    assert speculation.model is not None
    assert speculation.model.uri == "/models/others/small"


def test_the_pod_asks_for_the_tiers_and_every_members_cache(world: World) -> None:
    world.reconcile()
    (container,) = world.pod["containers"]
    assert int(container["resources"]["requests"]["memory"]) >= (1 << 30) + (2 << 30) + 2 * (512 << 20)
    assert world.get(DEPLOYMENT, "team-router")["spec"]["strategy"] == {"type": "Recreate"}


def test_status_says_who_is_resident_and_what_waking_takes(world: World) -> None:
    world.reconcile()
    assert world.tiers.asked == []
    assert world.condition("Ready")["status"] == "False"
    world.start()
    world.tiers.seen = {"chat": TierSeen(resident=True, wake_s=0.0), "code": TierSeen(resident=False, wake_s=2.5)}
    world.reconcile()
    assert world.tiers.asked == ["http://team-coe.default.svc:8000/metrics"]
    chat, code, maths = world.status["experts"]
    assert (chat["ready"], chat["resident"], chat["wakeS"]) == (True, True, 0.0)
    assert (code["ready"], code["resident"], code["wakeS"]) == (True, False, 2.5)
    assert (maths["ready"], "resident" in maths) == (False, False)
    assert world.status["modelPool"] == "1/2 resident"
    assert "chat, code share a model pool" in world.condition("Accepted")["message"]


def test_a_start_is_no_cause_for_warnings_and_an_expert_that_was_there_and_is_gone_is(world: World) -> None:
    def warnings() -> list[str]:
        return [event["message"] for event in world.api.list(EVENT, "default").items if event["type"] == "Warning"]

    def maths(status: str, reason: str) -> None:
        found = [{"type": "Available", "status": status, "reason": reason, "message": "as told"}]
        live = world.get(LLM_DEPLOYMENT, "maths")
        world.api.update(LLM_DEPLOYMENT, {**live, "status": {"conditions": found}}, manager="x", subresource="status")
        world.reconcile()

    world.reconcile()
    assert world.condition("Ready")["reason"] == "Initializing"
    assert "its model pool is starting" in world.condition("Ready")["message"]
    world.start()
    maths("False", "PodsPending")
    assert world.condition("Ready")["status"] == "True"
    assert world.condition("ExpertsReady")["reason"] == "Initializing"
    again_s = world.reconcile()
    assert again_s is not None
    assert again_s < TIERS_S, "a start is followed closely"
    maths("True", "Ready")
    assert world.condition("ExpertsReady")["status"] == "True"
    assert warnings() == []
    maths("False", "PodsPending")
    assert [message.partition(":")[0] for message in sorted(warnings())] == ["Degraded is True", "ExpertsReady is False"]
    world.start(ready=0)
    world.reconcile()
    assert world.condition("Ready")["reason"] == "NoExpertReady"


def test_at_rest_it_is_looked_at_often_and_nothing_is_written(world: World) -> None:
    world.edit(COMPOSITION, "team", experts=[{"name": n, "deploymentRef": n} for n in MEMBERS])
    world.reconcile()
    world.start()
    world.tiers.seen = {n: TierSeen(resident=True, wake_s=0.0) for n in MEMBERS}
    world.reconcile()
    world.api.calls.clear()
    assert world.reconcile() == TIERS_S
    assert not [call for call in world.api.calls if call.writes]


def test_what_members_have_from_secrets_is_there_and_their_certificate_is_the_doors(world: World) -> None:
    tls = {"certificateFile": "/etc/antiphon/secrets/door/tls.crt", "keyFile": "/etc/antiphon/secrets/door/tls.key"}
    shared = {"secretFiles": ["door"], "keySecret": {"secret": "parts", "key": "key"}}
    for name in MEMBERS:
        world.edit(LLM_DEPLOYMENT, name, endpoint={"tls": tls}, kubernetes=shared)
    world.reconcile()
    (container,) = world.pod["containers"]
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/etc/antiphon/secrets/door", "/etc/antiphon/key"} <= mounted
    assert {"name": "ANTIPHON_KEY_FILE", "value": "/etc/antiphon/key/key"} in container["env"]
    probes = ("readinessProbe", "livenessProbe", "startupProbe")
    assert [container[probe]["httpGet"]["scheme"] for probe in probes] == ["HTTPS"] * 3
    assert served(world).endpoint.tls is not None
    assert world.status["url"] == "https://team-coe.default.svc:8000/v1"


@pytest.mark.parametrize(
    ("member", "composition", "message"),
    [
        ({"pools": [{"name": "workers", "role": "monolith", "replicas": 2}]}, {}, "an expert of spec.tiers is one monolith"),
        ({"endpoint": {"unknownFields": "refuse"}}, {}, "spec.endpoint: is the model pool's"),
        ({"kubernetes": {"keySecret": {"secret": "own", "key": "key"}}}, {}, "spec.kubernetes.keySecret: is the model pool's"),
        ({"directory": {"redisUrl": "redis://r"}}, {}, "spec.directory: is the model pool's"),
        ({}, {"router": {"replicas": 2}}, "spec.router.replicas"),
        ({}, {"router": {"resources": {"memory": "3Gi"}}}, "3Gi is too little for the model pool, which needs"),
        ({}, {"tiers": {"residentMemory": "512Mi"}}, "more than spec.tiers.residentMemory"),
    ],
)
def test_experts_that_can_not_share_a_pool_are_refused_with_the_field(
    world: World, member: dict[str, Any], composition: dict[str, Any], message: str
) -> None:
    world.edit(LLM_DEPLOYMENT, "code", **member)
    world.edit(COMPOSITION, "team", **composition)
    world.reconcile()
    accepted = world.condition("Accepted")
    assert accepted["status"] == "False"
    assert message in accepted["message"]
    assert world.api.get(DEPLOYMENT, "default", "team-router") is None


def test_an_artifacts_claim_is_used(world: World) -> None:
    world.edit(LLM_DEPLOYMENT, "code", model={"uri": "hf://x/coder", "name": "code"})
    world.create(MODEL_ARTIFACT, "hub", {"uri": "hf://x/coder", "storage": {"claimName": "shared"}})
    world.reconcile()
    assert [d.spec.model.uri for d in served(world).deployments] == ["/models/models/chat", "/models/shared/artifacts/hub"]


def test_what_a_gateway_exposes_is_read() -> None:
    text = """# TYPE antiphon_tier_resident gauge
antiphon_tier_resident{antiphon_deployment="chat",antiphon_pool="w"} 1.0
antiphon_tier_resident{antiphon_deployment="code",antiphon_pool="w"} 0.0
# TYPE antiphon_tier_load_expected_seconds gauge
antiphon_tier_load_expected_seconds{antiphon_deployment="chat",antiphon_pool="w"} 0.0
antiphon_tier_load_expected_seconds{antiphon_deployment="code",antiphon_pool="w"} 2.4987
"""
    assert tiers_in(text) == {"chat": TierSeen(resident=True, wake_s=0.0), "code": TierSeen(resident=False, wake_s=2.5)}
