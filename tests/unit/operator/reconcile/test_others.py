"""Compositions and artifacts, from document to status, and what downloads weights."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from antiphon.coe.serving.doors.expert_key import check_key_host, key_headers
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import CheckpointInvalid, InvalidInput, Unavailable
from antiphon.gateway.access.keys import ApiKeys, keys_from
from antiphon_operator.fetch import digest_of, fetch
from antiphon_operator.kube.resources import (
    CLAIM,
    COMPOSITION,
    CONFIG_MAP,
    DEPLOYMENT,
    EVENT,
    JOB,
    LLM_DEPLOYMENT,
    MODEL_ARTIFACT,
    POD,
    Resource,
)
from antiphon_operator.reconcile.artifact import ArtifactReconciler
from antiphon_operator.reconcile.composition import CompositionReconciler
from antiphon_operator.reconcile.llm.weights import find_weights
from antiphon_operator.reconcile.scrape import percentile_ms
from antiphon_operator.render.settings import Runtime, Settings
from antiphon_operator.testing.memory_api import MemoryApi
from antiphon_operator.testing.memory_kube import MemoryKube

SETTINGS = Settings(runtime=Runtime(image="w:1", ray_version="2.60.0"))


class Cluster:
    def __init__(self) -> None:
        self.api = MemoryApi(clock=lambda: 1_700_000_000.0)
        kube = MemoryKube(self.api)
        self.composition = CompositionReconciler(kube, SETTINGS, clock=lambda: 1_700_000_000.0)
        self.artifact = ArtifactReconciler(kube, SETTINGS, clock=lambda: 1_700_000_000.0)

    def create(self, resource: Resource, name: str, spec: dict[str, Any]) -> None:
        self.api.create(resource, {"metadata": {"name": name, "namespace": "default"}, "spec": spec})

    def set_status(self, resource: Resource, name: str, status: dict[str, Any]) -> None:
        live = self.get(resource, name)
        self.api.update(resource, {**live, "status": status}, manager="x", subresource="status")

    def get(self, resource: Resource, name: str) -> dict[str, Any]:
        found = self.api.get(resource, "default", name)
        assert found is not None
        return found

    def ready(self, name: str, ready: bool = True) -> None:
        condition = {"type": "Ready", "status": "True" if ready else "False", "reason": "Ready" if ready else "CrashLoop"}
        self.set_status(LLM_DEPLOYMENT, name, {"conditions": [condition]})

    def conditions(self, resource: Resource, name: str) -> dict[str, tuple[str, str]]:
        return {c["type"]: (c["status"], c["reason"]) for c in self.get(resource, name)["status"]["conditions"]}


@pytest.fixture
def cluster() -> Cluster:
    made = Cluster()
    for name in ("chat", "code", "maths"):
        made.create(
            LLM_DEPLOYMENT,
            name,
            {"model": {"uri": "hf://a/b", "name": f"{name}-model"}, "pools": [{"name": "a", "role": "monolith"}]},
        )
        made.ready(name)
    experts: list[dict[str, Any]] = [{"name": n, "deploymentRef": n} for n in ("chat", "code", "maths")]
    experts.append(
        {"name": "law", "external": {"url": "https://law/v1", "model": "m", "apiKeySecret": {"name": "keys", "key": "law"}}}
    )
    router = {"apiKeysSecret": {"name": "door", "key": "keys"}}
    made.create(COMPOSITION, "team", {"experts": experts, "general": "chat", "router": router})
    return made


def route(cluster: Cluster) -> None:
    asyncio.run(cluster.composition.reconcile("default", "team"))


def test_the_router_gets_a_valid_document_with_every_expert_at_an_address(cluster: Cluster) -> None:
    route(cluster)
    value = yaml.safe_load(cluster.get(CONFIG_MAP, "team-router")["data"]["composition.yaml"])
    document = CompositionOfExperts.model_validate(value)
    code = document.spec.expert("code").external
    assert code is not None
    assert (code.url, code.model) == ("http://code-http.default.svc:8000/v1", "code-model")
    law = document.spec.expert("law").external
    assert law is not None
    assert law.api_key_env == "ANTIPHON_EXPERT_3_KEY"
    (container,) = cluster.get(DEPLOYMENT, "team-router")["spec"]["template"]["spec"]["containers"]
    key = next(e for e in container["env"] if e["name"] == "ANTIPHON_EXPERT_3_KEY")
    assert key["valueFrom"] == {"secretKeyRef": {"name": "keys", "key": "law"}}


def test_a_composition_is_ready_with_its_experts_and_router(cluster: Cluster) -> None:
    route(cluster)
    cluster.set_status(DEPLOYMENT, "team-router", {"readyReplicas": 1})
    route(cluster)
    assert cluster.conditions(COMPOSITION, "team")["Ready"] == ("True", "Ready")
    assert cluster.get(COMPOSITION, "team")["status"]["expertsReady"] == "4/4"
    cluster.api.calls.clear()
    route(cluster)
    assert not [call for call in cluster.api.calls if call.writes]


def test_a_changed_composition_is_ready_only_once_every_router_pod_runs_the_new_document(cluster: Cluster) -> None:
    """READY stood at True while the old pods answered: a Deployment's status speaks of its former spec at first."""
    route(cluster)
    generation = cluster.get(DEPLOYMENT, "team-router")["metadata"]["generation"]
    at_rest = {"observedGeneration": generation, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1}
    cluster.set_status(DEPLOYMENT, "team-router", at_rest)
    route(cluster)
    assert cluster.conditions(COMPOSITION, "team")["Ready"] == ("True", "Ready")
    live = cluster.get(COMPOSITION, "team")
    live["spec"]["experts"].pop()
    cluster.api.update(COMPOSITION, live, manager="kubectl")
    route(cluster)
    assert cluster.conditions(COMPOSITION, "team")["Ready"] == ("False", "NewRevision")
    after = cluster.get(DEPLOYMENT, "team-router")["metadata"]["generation"]
    assert after > generation
    coming = {"observedGeneration": after, "replicas": 2, "updatedReplicas": 1, "readyReplicas": 1}
    cluster.set_status(DEPLOYMENT, "team-router", coming)
    route(cluster)
    ready = next(c for c in cluster.get(COMPOSITION, "team")["status"]["conditions"] if c["type"] == "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "NewRevision")
    assert ready["message"] == "1 of 2 router pods still run the former document; requests are answered meanwhile"
    cluster.set_status(DEPLOYMENT, "team-router", at_rest | {"observedGeneration": after})
    route(cluster)
    assert cluster.conditions(COMPOSITION, "team")["Ready"] == ("True", "Ready")


def test_tiers_without_a_suspended_deployment_are_said_to_have_no_effect(cluster: Cluster) -> None:
    cluster.create(
        COMPOSITION,
        "small",
        {"experts": [{"name": "chat", "deploymentRef": "chat"}], "general": "chat", "tiers": {"residentMemory": "1Gi"}},
    )
    asyncio.run(cluster.composition.reconcile("default", "small"))
    accepted = next(c for c in cluster.get(COMPOSITION, "small")["status"]["conditions"] if c["type"] == "Accepted")
    assert accepted["status"] == "True"
    assert "spec.tiers has no effect" in accepted["message"]


def test_a_composition_degrades_when_an_expert_is_down_and_keeps_its_router(cluster: Cluster) -> None:
    route(cluster)
    cluster.set_status(DEPLOYMENT, "team-router", {"readyReplicas": 1})
    before = cluster.get(CONFIG_MAP, "team-router")
    cluster.ready("code", ready=False)
    route(cluster)
    found = cluster.conditions(COMPOSITION, "team")
    assert found["Degraded"] == ("True", "ExpertUnavailable")
    assert found["Ready"] == ("True", "Ready")
    assert cluster.get(COMPOSITION, "team")["status"]["expertsReady"] == "3/4"
    assert cluster.get(CONFIG_MAP, "team-router") == before


def test_a_missing_reference_is_named(cluster: Cluster) -> None:
    cluster.api.delete(LLM_DEPLOYMENT, "default", "maths")
    route(cluster)
    assert cluster.conditions(COMPOSITION, "team")["Accepted"] == ("False", "ReferenceNotFound")


def guard(cluster: Cluster, name: str, **kubernetes: Any) -> None:
    """Let the deployment ask for API keys."""
    live = cluster.get(LLM_DEPLOYMENT, name)
    live["spec"] |= {"endpoint": {"apiKeysEnv": "KEYS"}, "kubernetes": kubernetes}
    cluster.api.update(LLM_DEPLOYMENT, live, manager="kubectl")


def name_secret(cluster: Cluster, expert: int, secret: dict[str, str]) -> None:
    live = cluster.get(COMPOSITION, "team")
    live["spec"]["experts"][expert]["apiKeySecret"] = secret
    cluster.api.update(COMPOSITION, live, manager="kubectl")


def router(cluster: Cluster) -> tuple[CompositionOfExperts, dict[str, Any]]:
    """The document that the router reads and its environment, by name."""
    value = yaml.safe_load(cluster.get(CONFIG_MAP, "team-router")["data"]["composition.yaml"])
    (container,) = cluster.get(DEPLOYMENT, "team-router")["spec"]["template"]["spec"]["containers"]
    return CompositionOfExperts.model_validate(value), {e["name"]: e.get("valueFrom") for e in container["env"]}


def test_a_router_holds_no_deployments_own_keys_and_sends_those_it_has_nowhere_else(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard(cluster, "code", secretEnv=[{"name": "KEYS", "secret": "code-keys", "key": "accepted"}])
    route(cluster)
    assert "code-keys" not in str(router(cluster)[1])
    assert "set apiKeySecret of this expert" in str(cluster.get(COMPOSITION, "team")["status"]["experts"])
    name_secret(cluster, 1, {"name": "router-keys", "key": "code"})
    route(cluster)
    document, environment = router(cluster)
    endpoint = document.spec.expert("code").external
    assert endpoint is not None
    assert endpoint.api_key_env is not None
    assert environment[endpoint.api_key_env] == {"secretKeyRef": {"name": "router-keys", "key": "code"}}
    (container,) = cluster.get(DEPLOYMENT, "team-router")["spec"]["template"]["spec"]["containers"]
    for variable in container["env"]:
        if "value" in variable:
            monkeypatch.setenv(variable["name"], variable["value"])  # as the kubelet does
    secret = "first-key, second-key"
    monkeypatch.setenv(endpoint.api_key_env, secret)
    ApiKeys(keys_from(secret)).check(key_headers(endpoint)["authorization"])
    assert key_headers(endpoint.model_copy(update={"url": "https://elsewhere.example/v1"})) == {}
    open_endpoint = document.spec.expert("chat").external
    assert open_endpoint is not None
    assert key_headers(open_endpoint) == {}


def test_an_external_experts_key_goes_only_where_its_secret_says(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    route(cluster)
    document, environment = router(cluster)
    law = document.spec.expert("law").external
    assert law is not None
    assert law.api_key_env is not None
    hosts = f"{law.api_key_env}_HOSTS"
    assert environment[hosts] == {"secretKeyRef": {"name": "keys", "key": "law.hosts", "optional": True}}
    monkeypatch.setenv(law.api_key_env, "secret")
    monkeypatch.setenv("ANTIPHON_EXPERT_KEY_HOSTS", "required")
    for said, may in ((None, False), ("", False), ("other", False), ("law:8443", False), ("other, LAW", True), ("law:443", True)):
        if said is not None:
            monkeypatch.setenv(hosts, said)
        assert bool(key_headers(law)) is may
        if may:
            check_key_host(law, "external")
        else:
            with pytest.raises(InvalidInput, match=r"external\.url"):
                check_key_host(law, "external")


def test_a_routers_doors_take_keys_from_a_secret(cluster: Cluster) -> None:
    route(cluster)
    document, environment = router(cluster)
    assert document.spec.router.api_keys_secret is None
    (container,) = cluster.get(DEPLOYMENT, "team-router")["spec"]["template"]["spec"]["containers"]
    name = container["args"][container["args"].index("--api-keys-env") + 1]
    assert environment[name] == {"secretKeyRef": {"name": "door", "key": "keys"}}


@pytest.mark.parametrize("lent", ["law", "code"])
def test_a_router_without_keys_does_not_lend_its_experts_keys_to_whoever_reaches_it(cluster: Cluster, lent: str) -> None:
    live = cluster.get(COMPOSITION, "team")
    del live["spec"]["router"]
    if lent == "code":
        live["spec"]["experts"][1]["apiKeySecret"] = {"name": "router-keys", "key": "code"}
        del live["spec"]["experts"][3]
    cluster.api.update(COMPOSITION, live, manager="kubectl")
    route(cluster)
    assert cluster.conditions(COMPOSITION, "team")["Accepted"] == ("False", "InvalidSpec")
    (accepted,) = [c for c in cluster.get(COMPOSITION, "team")["status"]["conditions"] if c["type"] == "Accepted"]
    assert "spec.router.apiKeysSecret" in accepted["message"]
    assert cluster.api.get(DEPLOYMENT, "default", "team-router") is None
    live = cluster.get(COMPOSITION, "team")
    live["spec"]["router"] = {"lendsExpertKeys": True}  # something before it says who comes in
    cluster.api.update(COMPOSITION, live, manager="kubectl")
    route(cluster)
    assert cluster.conditions(COMPOSITION, "team")["Accepted"][0] == "True"
    assert cluster.get(DEPLOYMENT, "team-router")


def test_a_document_cant_send_the_routers_own_variables_anywhere(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """external.apiKeyEnv names a variable: in a pod all of them are somebody's."""
    live = cluster.get(COMPOSITION, "team")
    external = {"url": "https://mine.example/v1", "model": "m", "apiKeyEnv": "ANTIPHON_ROUTER_API_KEYS"}
    live["spec"]["experts"][3] = {"name": "law", "external": external}
    cluster.api.update(COMPOSITION, live, manager="kubectl")
    route(cluster)
    document, _ = router(cluster)
    (container,) = cluster.get(DEPLOYMENT, "team-router")["spec"]["template"]["spec"]["containers"]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable.get("value", "a secret"))  # as the kubelet does
    law = document.spec.expert("law").external
    assert law is not None
    assert key_headers(law) == {}
    with pytest.raises(InvalidInput, match=r"external\.url"):
        check_key_host(law, "external")


def test_a_guarded_deployment_without_a_known_secret_is_an_expert_that_is_not_ready_and_says_what_to_do(cluster: Cluster) -> None:
    guard(cluster, "code")
    route(cluster)
    status = cluster.get(COMPOSITION, "team")["status"]
    (code,) = [expert for expert in status["experts"] if expert["name"] == "code"]
    assert not code["ready"]
    assert "set apiKeySecret of this expert" in code["message"]
    assert status["expertsReady"] == "3/4"
    name_secret(cluster, 1, {"name": "router-keys", "key": "code"})
    route(cluster)
    assert cluster.get(COMPOSITION, "team")["status"]["expertsReady"] == "4/4"


def keep(cluster: Cluster) -> float | None:
    return asyncio.run(cluster.artifact.reconcile("default", "weights"))


def finish(cluster: Cluster, digest: str) -> None:
    cluster.set_status(JOB, "weights-download", {"conditions": [{"type": "Complete", "status": "True"}]})
    pod = {"metadata": {"name": "p", "namespace": "default", "labels": {"serving.antiphon.dev/artifact": "weights"}}}
    message = json.dumps({"digest": digest, "sizeBytes": 7})
    status = {"containerStatuses": [{"name": "download", "state": {"terminated": {"exitCode": 0, "message": message}}}]}
    cluster.api.create(POD, {**pod, "status": status})


GOOD = "sha256:" + "a" * 64


def test_an_artifact_is_downloaded_into_a_claim_of_its_own(cluster: Cluster) -> None:
    cluster.create(MODEL_ARTIFACT, "weights", {"uri": "hf://a/b", "digest": GOOD})
    keep(cluster)
    assert cluster.get(CLAIM, "weights")["spec"]["resources"]["requests"]["storage"] == "100Gi"
    assert cluster.conditions(MODEL_ARTIFACT, "weights")["Ready"] == ("False", "Downloading")
    finish(cluster, GOOD)
    keep(cluster)
    status = cluster.get(MODEL_ARTIFACT, "weights")["status"]
    assert (status["phase"], status["digest"], status["sizeBytes"], status["path"]) == ("Cached", GOOD, 7, "artifacts/weights")
    assert status["usedBy"] == ["chat", "code", "maths"]


def test_a_wrong_digest_is_never_cached(cluster: Cluster) -> None:
    cluster.create(MODEL_ARTIFACT, "weights", {"uri": "hf://a/b", "digest": GOOD})
    keep(cluster)
    finish(cluster, "sha256:" + "b" * 64)
    keep(cluster)
    assert cluster.conditions(MODEL_ARTIFACT, "weights")["Ready"] == ("False", "DigestMismatch")


def test_nothing_of_ours_holds_back_the_deletion_of_an_artifact_when_we_are_gone(cluster: Cluster) -> None:
    cluster.create(MODEL_ARTIFACT, "weights", {"uri": "hf://a/b"})
    keep(cluster)
    assert cluster.conditions(MODEL_ARTIFACT, "weights")["InUse"] == ("True", "InUse")
    cluster.api.delete(MODEL_ARTIFACT, "default", "weights")  # no pass of ours follows
    assert cluster.api.get(MODEL_ARTIFACT, "default", "weights") is None
    assert cluster.api.get(CLAIM, "default", "weights") is None


def test_the_finalizer_of_an_earlier_version_is_taken_off(cluster: Cluster) -> None:
    value = {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "ModelArtifact",
        "metadata": {"name": "weights", "namespace": "default", "finalizers": ["serving.antiphon.dev/in-use"]},
    }
    cluster.api.apply(MODEL_ARTIFACT, value, manager="antiphon-operator-finalizer")
    cluster.api.merge_patch(MODEL_ARTIFACT, "default", "weights", {"spec": {"uri": "hf://a/b"}}, manager="kubectl")
    keep(cluster)
    assert not cluster.get(MODEL_ARTIFACT, "weights")["metadata"].get("finalizers")


def test_a_failed_download_says_why_on_the_artifact_and_on_who_waits_for_it(cluster: Cluster) -> None:
    cluster.create(MODEL_ARTIFACT, "weights", {"uri": "hf://a/b"})
    keep(cluster)
    why = "hf://a/b: 401 Client Error: the repository is gated, HF_TOKEN is missing"
    pod = {"metadata": {"name": "p", "namespace": "default", "labels": {"serving.antiphon.dev/artifact": "weights"}}}
    ended = {"terminated": {"exitCode": 1, "reason": "Error", "message": why}}
    cluster.api.create(POD, {**pod, "status": {"phase": "Failed", "containerStatuses": [{"name": "download", "state": ended}]}})
    keep(cluster)
    waiting = next(c for c in cluster.get(MODEL_ARTIFACT, "weights")["status"]["conditions"] if c["type"] == "Ready")
    assert (waiting["reason"], waiting["message"]) == ("Downloading", f"tried again after: {why}")
    limit = "Job has reached the specified backoff limit"
    cluster.set_status(JOB, "weights-download", {"conditions": [{"type": "Failed", "status": "True", "message": limit}]})
    keep(cluster)
    failed = next(c for c in cluster.get(MODEL_ARTIFACT, "weights")["status"]["conditions"] if c["type"] == "Ready")
    assert (failed["reason"], failed["message"]) == ("DownloadFailed", f"{why} ({limit})")
    document = LLMDeployment.model_validate(
        {k: v for k, v in cluster.get(LLM_DEPLOYMENT, "chat").items() if k in ("apiVersion", "kind", "metadata", "spec")}
    )
    found = find_weights(document, [cluster.get(MODEL_ARTIFACT, "weights")])
    assert why in found.model.message


def test_a_new_artifact_gives_no_warnings(cluster: Cluster) -> None:
    cluster.create(MODEL_ARTIFACT, "spare", {"uri": "hf://nobody/uses-it"})
    asyncio.run(cluster.artifact.reconcile("default", "spare"))
    assert [e["message"] for e in cluster.api.list(EVENT, "default").items if e["type"] == "Warning"] == []


def test_a_claim_is_used_in_place(cluster: Cluster) -> None:
    cluster.create(MODEL_ARTIFACT, "weights", {"uri": "pvc://disk/models/x"})
    keep(cluster)
    status = cluster.get(MODEL_ARTIFACT, "weights")["status"]
    assert (status["phase"], status["claimName"], status["path"]) == ("Cached", "disk", "models/x")
    assert cluster.api.list(JOB, "default").items == ()


def test_a_directory_is_fetched_whole_and_its_digest_checked(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "a.bin").write_bytes(b"one")
    (source / "sub/b.bin").write_bytes(b"three")
    digest = digest_of(source)
    into = tmp_path / "claim/weights"
    assert fetch(f"file://{source}", into, digest=digest.digest) == digest
    assert (into / "sub/b.bin").read_bytes() == b"three"
    assert digest.size_bytes == 8
    with pytest.raises(CheckpointInvalid, match="was asked for"):
        fetch(f"file://{source}", tmp_path / "other", digest=GOOD)
    assert not (tmp_path / "other").exists()
    with pytest.raises(Unavailable):
        fetch("file:///nowhere", tmp_path / "third")


def test_a_percentile_is_of_what_came_since_the_last_scrape() -> None:
    before = {0.1: 100.0, 0.2: 100.0, float("inf"): 100.0}
    now = {0.1: 100.0, 0.2: 120.0, float("inf"): 120.0}
    assert percentile_ms(now, before) == pytest.approx(195.0)
    assert percentile_ms(now, now) is None


def test_an_artifact_is_used_by_who_drafts_with_it(cluster: Cluster) -> None:
    cluster.create(LLM_DEPLOYMENT, "small", {"model": {"uri": "hf://a/small"}, "pools": [{"name": "a", "role": "monolith"}]})
    pools = [{"name": "a", "role": "monolith"}]
    for name, model in (
        ("large", {"deploymentRef": "small"}),
        ("larger", {"uri": "hf://a/small"}),
        ("lost", {"deploymentRef": "x"}),
    ):
        speculation = {"drafter": "model", "model": model}
        cluster.create(LLM_DEPLOYMENT, name, {"model": {"uri": "/m"}, "pools": pools, "speculation": speculation})
    cluster.create(MODEL_ARTIFACT, "weights", {"uri": "hf://a/small"})
    keep(cluster)
    assert cluster.get(MODEL_ARTIFACT, "weights")["status"]["usedBy"] == ["large", "larger", "small"]
