"""The kinds on a real API server: it takes their definitions, checks their rules, and the operator comes to rest on it."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from antiphon.core.errors import Unavailable
from antiphon_operator.api.crds import KINDS, definitions
from antiphon_operator.api.rules import Rule
from antiphon_operator.kube.base import Kube, NotFound
from antiphon_operator.kube.resources import (
    COMPOSITION,
    HTTP_ROUTE,
    INFERENCE_POOL,
    LLM_DEPLOYMENT,
    MODEL_ARTIFACT,
    RAY_CLUSTER,
    RAY_SERVICE,
    RESOURCES,
    SERVING_POOL,
    Resource,
)
from antiphon_operator.kube.rest import RestKube, load_config
from antiphon_operator.reconcile.artifact import ArtifactReconciler
from antiphon_operator.reconcile.composition import CompositionReconciler
from antiphon_operator.reconcile.llm.reconciler import LLMReconciler
from antiphon_operator.render.settings import Runtime, Settings
from antiphon_operator.testing.ray_kinds import gateway_definitions, ray_definitions
from antiphon_operator.testing.real_api import ApiServer, find_assets
from antiphon_operator.testing.rule_cases import case_of

ASSETS = find_assets()
pytestmark = pytest.mark.skipif(ASSETS is None, reason="KUBEBUILDER_ASSETS names no directory with etcd and kube-apiserver")
SETTINGS = Settings(runtime=Runtime(image="antiphon/worker:1", ray_version="2.60.0"))
EXAMPLES = Path(__file__).parents[2] / "deploy/examples"
OURS = "/apis/serving.antiphon.dev/v1alpha1/namespaces/default"
PLURALS = {kind.kind: kind.plural for kind in KINDS}
ALL_RULES = [pytest.param(kind.kind, rule, id=f"{kind.kind}-{rule.message[:40]}") for kind in KINDS for rule in kind.rules]


def theirs(variable: str, *resources: Resource) -> list[dict[str, Any]]:
    """The kinds' own definitions from the directory that ``variable`` names, else ones that take anything."""
    directory = os.environ.get(variable)
    if directory is None:
        anything = (*ray_definitions(), *gateway_definitions())
        return [value for value in anything if value["spec"]["names"]["kind"] in {resource.kind for resource in resources}]
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    files = [Path(directory) / f"{resource.group}_{resource.plural}.yaml" for resource in resources]
    return [yaml.load(path.read_text(), Loader=loader) for path in files]


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    assert ASSETS is not None
    with ApiServer(ASSETS, users=("operator",)) as started:
        started.install([*definitions(), *theirs("ANTIPHON_KUBERAY_CRDS", RAY_SERVICE, RAY_CLUSTER)])
        yield started


@pytest.fixture
async def kube(server: ApiServer, tmp_path: Path) -> AsyncIterator[Kube]:
    path = tmp_path / "kubeconfig"
    path.write_text(server.kubeconfig())
    async with RestKube(load_config(str(path))) as rest:
        yield rest


def create(server: ApiServer, value: dict[str, Any], *, keep: bool = False) -> dict[str, Any]:
    path = f"{OURS}/{PLURALS[value['kind']]}"
    return server.request("POST", path if keep else f"{path}?dryRun=All", value)


def check(server: ApiServer, case: Any) -> None:
    """Create the document, or the older one and then the change; raises when the API server refuses."""
    if not isinstance(case, tuple):
        create(server, case)
        return
    old, new = case
    name = f"{old['metadata']['name']}-{uuid.uuid4().hex[:6]}"
    made = create(server, {**old, "metadata": {"name": name}}, keep=True)
    path = f"{OURS}/{PLURALS[old['kind']]}/{name}"
    try:
        changed = {**new, "metadata": {"name": name, "resourceVersion": made["metadata"]["resourceVersion"]}}
        server.request("PUT", f"{path}?dryRun=All", changed)
    finally:
        server.request("DELETE", path)


@pytest.mark.parametrize(("kind", "rule"), ALL_RULES)
def test_the_api_server_accepts_the_good_document_of_a_rule(server: ApiServer, kind: str, rule: Rule) -> None:
    check(server, case_of(kind, rule)[0])  # raises what the API server says against it


@pytest.mark.parametrize(("kind", "rule"), ALL_RULES)
def test_the_api_server_refuses_the_bad_document_with_the_rules_message(server: ApiServer, kind: str, rule: Rule) -> None:
    with pytest.raises(Unavailable) as refused:
        check(server, case_of(kind, rule)[1])
    assert rule.message in str(refused.value).replace('\\"', '"')


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_is_accepted(server: ApiServer, path: Path) -> None:
    for value in yaml.safe_load_all(path.read_text()):
        create(server, value)  # raises what the API server says against it


async def passes(kube: Kube, name: str, count: int = 6) -> None:
    llm, coe, artifact = (
        LLMReconciler(kube, SETTINGS, clock=time.time),
        CompositionReconciler(kube, SETTINGS, clock=time.time),
        ArtifactReconciler(kube, SETTINGS, clock=time.time),
    )
    for _ in range(count):
        for reconciler in (artifact, llm, coe):
            await reconciler.reconcile("default", name)


async def everything(kube: Kube) -> dict[tuple[str, str], str]:
    found = {}
    for resource in RESOURCES:
        try:
            items = (await kube.list(resource, "default")).items
        except NotFound:
            assert resource in (HTTP_ROUTE, INFERENCE_POOL), "a cluster may lack the Gateway API, and nothing else"
            continue
        for item in items:
            found[resource.kind, item["metadata"]["name"]] = item["metadata"]["resourceVersion"]
    return found


async def test_the_operator_comes_to_rest_and_then_writes_nothing(server: ApiServer, kube: Kube) -> None:
    pools = [
        {"name": "attention", "role": "attention", "scaling": {"mode": "External", "minReplicas": 1, "maxReplicas": 3}},
        {"name": "ffn", "role": "ffn", "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]},
    ]
    spec = {"model": {"uri": "hf://a/b"}, "topology": "afd", "pools": pools}
    head = {"apiVersion": "serving.antiphon.dev/v1alpha1", "metadata": {"name": "demo"}}
    create(server, {**head, "kind": "ModelArtifact", "spec": {"uri": "hf://a/b"}}, keep=True)
    create(server, {**head, "kind": "LLMDeployment", "spec": spec}, keep=True)
    experts = [{"name": "x", "deploymentRef": "demo"}]
    create(server, {**head, "kind": "CompositionOfExperts", "spec": {"experts": experts, "general": "x"}}, keep=True)
    await passes(kube, "demo", 2)
    server.request(
        "PATCH",
        f"{OURS}/modelartifacts/demo/status?fieldManager=tests&force=true",
        {**head, "kind": "ModelArtifact", "status": {"phase": "Cached", "observedGeneration": 1}},
    )
    await passes(kube, "demo")
    before = await everything(kube)
    for kind in ("RayService", "ServingPool", "Service", "PodDisruptionBudget", "NetworkPolicy", "ControllerRevision", "Job"):
        assert any(key[0] == kind for key in before), f"no {kind} was made"
    await passes(kube, "demo", 2)
    assert await everything(kube) == before
    for resource in (LLM_DEPLOYMENT, COMPOSITION, MODEL_ARTIFACT):
        live = await kube.get(resource, "default", "demo")
        assert live is not None
        accepted = {c["type"]: c for c in live["status"]["conditions"]}["Accepted"]
        assert (accepted["status"], accepted["observedGeneration"]) == ("True", live["metadata"]["generation"])


async def test_scale_reaches_a_pool_and_stays(server: ApiServer, kube: Kube) -> None:
    head = {"apiVersion": "serving.antiphon.dev/v1alpha1", "metadata": {"name": "scaled"}}
    pool = {"name": "all", "role": "monolith", "scaling": {"mode": "External", "minReplicas": 1, "maxReplicas": 5}}
    create(server, {**head, "kind": "LLMDeployment", "spec": {"model": {"uri": "/m"}, "pools": [pool]}}, keep=True)
    await passes(kube, "scaled", 2)
    path = f"{OURS}/servingpools/scaled-all/scale"
    scale = server.request("GET", path)
    assert scale["spec"]["replicas"] == 1
    scale["spec"]["replicas"] = 3
    server.request("PUT", path, scale)
    await passes(kube, "scaled", 2)
    live = await kube.get(SERVING_POOL, "default", "scaled-all")
    assert live is not None
    assert (live["spec"]["replicas"], live["status"]["acceptedReplicas"]) == (3, 3)
    service = await kube.get(RAY_SERVICE, "default", "scaled")
    assert service is not None
    assert "num_replicas: 3" in service["spec"]["serveConfigV2"]


async def test_gateway_objects_come_once_their_kinds_do_and_go_when_they_are_no_longer_asked_for(
    server: ApiServer, kube: Kube
) -> None:
    head = {"apiVersion": "serving.antiphon.dev/v1alpha1", "kind": "LLMDeployment", "metadata": {"name": "fronted"}}
    spec = {"model": {"uri": "/m"}, "pools": [{"name": "all", "role": "monolith"}]}
    gateway = {"gateway": {"parentRefs": [{"name": "public"}], "hostnames": ["models.example.org"], "inferencePool": True}}
    create(server, {**head, "spec": {**spec, "kubernetes": gateway}}, keep=True)
    await passes(kube, "fronted", 2)

    async def ready() -> dict[str, str]:
        live = await kube.get(LLM_DEPLOYMENT, "default", "fronted")
        assert live is not None
        return dict({c["type"]: c for c in live["status"]["conditions"]}["Ready"])

    assert (await ready())["reason"] == "GatewayApiMissing"
    server.install(theirs("ANTIPHON_GATEWAY_CRDS", HTTP_ROUTE, INFERENCE_POOL))
    await passes(kube, "fronted", 2)
    assert (await ready())["reason"] == "Initializing"
    before = await everything(kube)
    assert {("HTTPRoute", "fronted-http"), ("InferencePool", "fronted-gateways")} <= before.keys()
    await passes(kube, "fronted", 2)
    assert await everything(kube) == before
    live = await kube.get(LLM_DEPLOYMENT, "default", "fronted")
    assert live is not None
    live["spec"].pop("kubernetes")
    server.request("PUT", f"{OURS}/llmdeployments/fronted", live)
    await passes(kube, "fronted", 2)
    assert not {"HTTPRoute", "InferencePool"} & {kind for kind, _ in await everything(kube)}
