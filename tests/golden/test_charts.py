"""The charts: linted, typed, restricted, with the rights that the operator uses and no others."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import importlib
import json
import re
import subprocess
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo, WorkerLoad
from antiphon.gateway.metrics.instruments import GatewayMetrics
from antiphon.telemetry import setup
from antiphon_operator.controller.handlers import WATCHED, WATCHED_BY_LABEL
from antiphon_operator.controller.observability import OperatorMetrics
from antiphon_operator.kube.resources import COMPOSITION, JOB, LLM_DEPLOYMENT, MODEL_ARTIFACT, NETWORK_POLICY
from antiphon_operator.reconcile import scrape
from antiphon_operator.reconcile.artifact import ArtifactReconciler
from antiphon_operator.reconcile.composition import CompositionReconciler
from antiphon_operator.reconcile.llm.reconciler import LLMReconciler
from antiphon_operator.render.settings import Runtime, Settings
from antiphon_operator.testing.kuberay import KubeRay
from antiphon_operator.testing.memory_api import MemoryApi
from antiphon_operator.testing.memory_kube import MemoryKube

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/antiphon"
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def run(helm: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(helm), *arguments], capture_output=True, text=True, timeout=120, check=False)


@functools.cache
def template(helm: Path, *settings: str, chart: Path = CHART) -> list[dict[str, Any]]:
    """What helm renders; once for equal arguments, so nobody may change it."""
    arguments = [part for setting in settings for part in ("--set-json", setting)]
    done = run(helm, "template", "antiphon", str(chart), "--namespace", "antiphon-system", *arguments)
    assert done.returncode == 0, done.stderr
    return [value for value in yaml.load_all(done.stdout, Loader=LOADER) if value]


MATRIX = [
    (),
    ('watchNamespaces=["models","team"]',),
    ("replicas=1", 'podDisruptionBudget={"enabled":true}'),
    ('networkPolicy={"enabled":true,"metricsNamespaceLabels":{"team":"watch"}}', 'podAnnotations={"a":"b"}'),
    ('networkPolicy={"enabled":false}', 'serviceAccount={"create":false,"name":"mine"}', 'rbac={"create":true,"aggregate":false}'),
    ('image={"repository":"r/o","digest":"sha256:' + "a" * 64 + '"}', 'imagePullSecrets=[{"name":"s"}]', 'nodeSelector={"a":"b"}'),
    (
        'metrics={"serviceMonitor":{"enabled":true},"prometheusRule":{"enabled":true},"dashboards":{"enabled":true}}',
        'tolerations=[{"key":"a","operator":"Exists"}]',
        'priorityClassName="high"',
    ),
    ('rbac={"create":false,"aggregate":false}',),
    ('gateway={"cpu":"2"}', 'head={"memory":"8Gi"}', 'router={"image":"r:1"}', 'artifacts={"image":"a:1"}'),
]
CUSTOM = ("ServiceMonitor", "PrometheusRule")


@pytest.mark.parametrize("chart", ["antiphon", "antiphon-crds"])
def test_the_linter_is_content(helm: Path, chart: str) -> None:
    done = run(helm, "lint", "--strict", str(ROOT / "helm" / chart))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("settings", MATRIX, ids=lambda s: hashlib.sha256(repr(s).encode()).hexdigest()[:6])
def test_rendered_objects_are_typed_kubernetes_objects(helm: Path, settings: tuple[str, ...]) -> None:
    for value in template(helm, *settings):
        if value["kind"] in CUSTOM:
            continue
        group = value["apiVersion"].rpartition("/")[0].partition(".")[0] or "core"
        module = importlib.import_module(f"lightkube.models.{group}_{value['apiVersion'].rpartition('/')[2]}")
        assert problems(getattr(module, value["kind"]), value, value["kind"]) == []


type_hints = functools.cache(typing.get_type_hints)


def problems(kind: Any, value: Any, where: str) -> list[str]:
    """What does not fit the typed model: unknown fields and wrong types, all the way down."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        options = [a for a in arguments if a is not type(None)]
        found = [problems(option, value, where) for option in options]
        return min(found, key=len) if found else []
    if origin is list:
        return (
            [p for i, item in enumerate(value) for p in problems(arguments[0], item, f"{where}[{i}]")]
            if isinstance(value, list)
            else [f"{where}: no list"]
        )
    if origin is dict:
        return [] if isinstance(value, dict) else [f"{where}: no map"]
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            return [f"{where}: no object"]
        hints = type_hints(kind)
        fields = {f.metadata.get("json", f.name.rstrip("_")): hints[f.name] for f in dataclasses.fields(kind)}
        return [
            problem
            for key, inner in value.items()
            for problem in (problems(fields[key], inner, f"{where}.{key}") if key in fields else [f"{where}.{key}: unknown"])
        ]
    if kind in (str, int, bool, float) and not isinstance(value, kind):
        return [f"{where}: {value!r} is no {kind.__name__}"]
    return []


def pod_specs(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        v["spec"]["template"]["spec"] if v["kind"] == "Deployment" else v["spec"]
        for v in values
        if v["kind"] in ("Deployment", "Pod")
    ]


def restricted(spec: dict[str, Any]) -> bool:
    """The restricted pod-security profile, for what our pods use."""
    pod = spec["securityContext"]
    safe_volumes = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret", "name"}
    for container in spec["containers"]:
        context = container["securityContext"]
        if context.get("allowPrivilegeEscalation") is not False or context["capabilities"] != {"drop": ["ALL"]}:
            return False
        if (context.get("seccompProfile") or pod.get("seccompProfile")) != {"type": "RuntimeDefault"}:
            return False
        if not (context.get("runAsNonRoot") or pod.get("runAsNonRoot")) or context.get("privileged"):
            return False
    volumes = all(set(volume) <= safe_volumes for volume in spec.get("volumes", ()))
    return volumes and not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))


def test_pods_meet_the_restricted_profile(helm: Path) -> None:
    specs = pod_specs(template(helm))
    assert len(specs) == 2
    assert all(restricted(spec) for spec in specs)


def test_the_charts_own_test_reaches_the_operator_whoever_else_may(helm: Path) -> None:
    values = template(helm, 'networkPolicy={"enabled":true,"metricsNamespaceLabels":{"team":"watch"}}')
    (policy,) = [value for value in values if value["kind"] == "NetworkPolicy"]
    (pod,) = [value for value in values if value["kind"] == "Pod"]
    (rule,) = policy["spec"]["ingress"]
    own = [peer["podSelector"]["matchLabels"] for peer in rule["from"] if set(peer) == {"podSelector"}]
    assert any(labels.items() <= pod["metadata"]["labels"].items() for labels in own)


@pytest.mark.parametrize(
    "typo",
    [
        "replica=2",
        'image={"repositry":"x"}',
        "replicas=0",
        'networkPolicy={"enable":true}',
        'gateway={"cpu":"two"}',
        'router={"replicas":2}',
        'image={"repository":"a","digest":"sha256:x"}',
    ],
)
def test_a_typo_in_the_values_is_refused(helm: Path, typo: str) -> None:
    assert run(helm, "template", "x", str(CHART), "--set-json", typo).returncode != 0


def test_the_chart_of_kinds_keeps_them_by_default(helm: Path) -> None:
    kinds = template(helm, chart=ROOT / "helm/antiphon-crds")
    assert len(kinds) == 4
    assert {k["metadata"]["annotations"]["helm.sh/resource-policy"] for k in kinds} == {"keep"}


def test_rights_are_given_per_watched_namespace(helm: Path) -> None:
    values = template(helm, 'watchNamespaces=["models","team"]')
    assert sorted(v["metadata"]["namespace"] for v in values if v["kind"] == "Role") == ["antiphon-system", "models", "team"]
    assert not any(v["kind"] == "ClusterRoleBinding" for v in values)


def test_no_secret_may_be_read(helm: Path) -> None:
    for value in template(helm):
        if value["kind"] in ("Role", "ClusterRole") and "view" not in value["metadata"]["name"]:
            assert not any("secrets" in rule["resources"] or "*" in rule["verbs"] for rule in value["rules"])


def test_every_option_of_the_operator_can_be_set_from_the_chart(helm: Path) -> None:
    from typer.main import get_command

    from antiphon_operator.cli import app

    command = get_command(app).commands["run"]  # type: ignore[attr-defined]
    variables = {parameter.envvar for parameter in command.params if parameter.envvar}
    deployment = next(v for v in template(helm) if v["kind"] == "Deployment")
    given = {variable["name"] for variable in deployment["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert variables == given - {"HOME"}


def test_the_operators_user_can_be_left_to_the_cluster(helm: Path) -> None:
    def context(*settings: str) -> dict[str, Any]:
        deployment = next(v for v in template(helm, *settings) if v["kind"] == "Deployment")
        return dict(deployment["spec"]["template"]["spec"]["securityContext"])

    assert context()["runAsUser"] == 65532
    assert context("runAsUser=1000740000")["runAsUser"] == 1_000_740_000
    anyone = context("runAsUser=null")
    assert anyone["runAsNonRoot"] is True
    assert "runAsUser" not in anyone


def names_and_labels(expression: str) -> tuple[set[str], set[str]]:
    """Metrics that a PromQL expression reads, and the labels that it groups and selects by."""
    labels = {part.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for part in group.split(",")}
    labels |= {match for braces in re.findall(r"\{([^}]*)\}", expression) for match in re.findall(r"(\w+)\s*[!=]", braces)}
    return set(re.findall(r"\b(?:antiphon_\w+|gen_ai_\w+|vllm:\w+)", re.sub(r"by \([^)]*\)|\{[^}]*\}", "", expression))), labels


@pytest.fixture
def scraped(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Every sample that a gateway and the operator expose after some work, with the labels it has."""
    monkeypatch.delenv("OTEL_SDK_DISABLED", raising=False)
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    worker = WorkerInfo(
        worker_id=WorkerId("d/a/0"), deployment="d", pool="a", role=Role.ATTENTION, model="m", revision="r", fingerprint="f",
        epoch=Epoch(1), endpoint=Endpoint(rpc="h:1", data=""), pid=1, host="h", load=WorkerLoad(),
    )  # fmt: skip
    with setup("gateway") as telemetry:
        gateway = GatewayMetrics(telemetry, workers=lambda: [worker], num_requests=lambda: 0, held=lambda: {"m": 0})
        gateway.first_token("m", 0.1)
        gateway.tokens("m", 2, 0.1)
        gateway.generated("m", 2)
        gateway.choice_finished("m", "stop", 0.1)
        gateway.request_finished("m", 1.0, 5, 1)
        gateway.request_failed("m", "overloaded")
        text = telemetry.prometheus_text().decode()
    operator = OperatorMetrics()
    operator.passes.labels(kind="LLMDeployment", result="ok").inc()
    operator.seconds.labels(kind="LLMDeployment").observe(0.1)
    operator.stage("scheduled", 5.0)
    text += generate_latest(operator.registry).decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_dashboards_and_alerts_read_what_is_really_exposed(helm: Path, scraped: dict[str, set[str]]) -> None:
    panels = json.loads((CHART / "dashboards/antiphon.json").read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    (rules,) = [v for v in template(helm, 'metrics={"prometheusRule":{"enabled":true}}') if v["kind"] == "PrometheusRule"]
    expressions += [rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"]]
    assert len(expressions) > 12
    for expression in expressions:
        names, labels = names_and_labels(expression)
        assert names, expression
        assert names <= scraped.keys(), expression
        assert labels <= set().union(*(scraped[name] for name in names)), expression


def test_autoscaling_reads_what_a_gateway_really_exposes(scraped: dict[str, set[str]]) -> None:
    assert {
        f"{scrape.TTFT}_bucket",
        f"{scrape.TPOT}_bucket",
        scrape.WAITING,
        scrape.RUNNING,
        scrape.HELD,
        scrape.KV_USAGE,
    } <= scraped.keys()
    assert scrape.POOL_LABEL in scraped[scrape.WAITING] & scraped[scrape.KV_USAGE]


class Scenario:
    """Everything the operator does, recorded."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0
        self.api = MemoryApi(clock=lambda: self.now_s)
        self.kuberay = KubeRay(api=self.api)
        settings = Settings(runtime=Runtime(image="w:1", ray_version="2.60.0"))
        kube = MemoryKube(self.api)
        self.reconcilers = (
            LLMReconciler(kube, settings, clock=lambda: self.now_s),
            CompositionReconciler(kube, settings, clock=lambda: self.now_s),
            ArtifactReconciler(kube, settings, clock=lambda: self.now_s),
        )

    def passes(self, count: int = 15) -> None:
        async def once() -> None:
            for reconciler in self.reconcilers:
                await reconciler.reconcile("default", "demo")

        for _ in range(count):
            asyncio.run(once())
            self.kuberay.tick()
            self.now_s += 5

    def quietly(self, change: Any) -> None:
        self.api.quiet = True
        change()
        self.api.quiet = False

    def edit(self, **spec: Any) -> None:
        def change() -> None:
            live = self.api.get(LLM_DEPLOYMENT, "default", "demo")
            assert live is not None
            live["spec"] |= spec
            self.api.update(LLM_DEPLOYMENT, live, manager="kubectl")

        self.quietly(change)

    def create(self, resource: Any, spec: dict[str, Any]) -> None:
        value = {"metadata": {"name": "demo", "namespace": "default"}, "spec": spec}
        self.quietly(lambda: self.api.create(resource, value, manager="kubectl"))


def recorded() -> set[tuple[str, str, str]]:
    scenario = Scenario()
    pool = {"name": "all", "role": "monolith", "resources": {"gpu": 1}}
    scaled = {**pool, "scaling": {"mode": "External", "minReplicas": 1, "maxReplicas": 3}}
    held = {"name": "demo", "namespace": "default", "finalizers": ["serving.antiphon.dev/in-use"]}  # of an earlier version
    artifact = {"metadata": held, "spec": {"uri": "hf://a/b"}}
    scenario.quietly(lambda: scenario.api.create(MODEL_ARTIFACT, artifact, manager="antiphon-operator-finalizer"))
    scenario.create(
        LLM_DEPLOYMENT,
        {
            "model": {"uri": "hf://a/b"},
            "pools": [scaled, {**pool, "name": "more"}],
            "gpuBudget": 8,
            "rollout": {"progressDeadlineS": 30},
            "kubernetes": {"gateway": {"parentRefs": [{"name": "public"}], "inferencePool": True}},
        },
    )
    scenario.create(COMPOSITION, {"experts": [{"name": "x", "deploymentRef": "demo"}], "general": "x"})
    scenario.passes(3)

    def finish() -> None:
        job = scenario.api.get(JOB, "default", "demo-download")
        assert job is not None
        status = {"conditions": [{"type": "Complete", "status": "True"}]}
        scenario.api.update(JOB, {**job, "status": status}, manager="kubelet", subresource="status")

    scenario.quietly(finish)
    scenario.passes()
    scenario.edit(gpuBudget=9, pools=[scaled], kubernetes={"networkPolicy": False})
    scenario.passes()
    assert scenario.api.list(NETWORK_POLICY, "default").items == ()
    scenario.kuberay.broken_images.add("broken")
    scenario.edit(kubernetes={"image": "broken"})
    scenario.passes(30)
    scenario.edit(kubernetes={"image": "w:2"})
    scenario.passes()
    scenario.quietly(lambda: scenario.api.delete(LLM_DEPLOYMENT, "default", "demo"))
    scenario.passes(3)
    calls = {(c.verb, c.group, c.resource) for c in scenario.api.calls}
    return calls | {(verb, r.group, r.plural) for r in (*WATCHED, *WATCHED_BY_LABEL) for verb in ("list", "watch")}


def test_the_operator_may_do_what_it_does_and_nothing_else(helm: Path) -> None:
    rules = next(v["rules"] for v in template(helm) if v["kind"] == "ClusterRole" and v["metadata"]["name"] == "antiphon-operator")
    given = {
        (verb, group, resource)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    given = {right for right in given if not right[2].endswith("/finalizers")}  # asked by the API server, not by a call
    used = recorded()
    assert ("create", "serving.antiphon.dev", "servingpools") in used
    assert used - given == set(), "rights are missing"
    # A deleted Service or budget is only seen where names of children change with a newer operator.
    assert given - used - {("delete", "", "services"), ("delete", "policy", "poddisruptionbudgets")} == set(), "rights are unused"


def test_rendered_pods_of_deployments_meet_the_restricted_profile() -> None:
    from antiphon.core.document.spec import LLMDeployment
    from antiphon_operator.render.ray_cluster import ray_cluster

    document = LLMDeployment.model_validate(
        {
            "apiVersion": "serving.antiphon.dev/v1alpha1",
            "kind": "LLMDeployment",
            "metadata": {"name": "demo"},
            "spec": {"model": {"uri": "/m"}, "pools": [{"name": "all", "role": "monolith"}]},
        }
    )
    runtime = Runtime(image="w:1", ray_version="2.60.0")
    cluster = ray_cluster(document, Settings(runtime=runtime), runtime, None)
    templates = [cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"])]
    assert all(restricted(t["spec"]) for t in templates)
    from lightkube.models.core_v1 import PodTemplateSpec

    assert [problems(PodTemplateSpec, t, "template") for t in templates] == [[], [], []]
