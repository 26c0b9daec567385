"""What is rendered for a document: the same bytes every time, taken by Ray's own schema and by typed Kubernetes objects."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve.schema import ServeDeploySchema

from antiphon.apps.serve.plan import GATEWAY, plan_serve
from antiphon.apps.serve_entry import BuildArgs
from antiphon.core.document.spec import LLMDeployment
from antiphon_operator.planning.preview import preview_documents
from antiphon_operator.render import children
from antiphon_operator.render.canonical import canonical, parse_yaml
from antiphon_operator.render.ray_cluster import bounds
from antiphon_operator.render.revision import render_revision
from antiphon_operator.render.serve import serve_config, sizes_of
from antiphon_operator.render.settings import Runtime, Settings, Weights

SETTINGS = Settings(runtime=Runtime(image="antiphon/worker:1", ray_version="2.60.0"))
OWNER = {"apiVersion": "serving.antiphon.dev/v1alpha1", "kind": "LLMDeployment", "name": "qwen", "uid": "u", "controller": True}
SPEC: dict[str, Any] = {
    "model": {"uri": "pvc://weights/qwen", "name": "qwen"},
    "topology": "pd-afd",
    "gpuBudget": 32,
    "pools": [
        {"name": "prefill", "role": "prefill", "replicas": 2, "resources": {"cpu": "8", "memory": "64Gi", "gpu": 1}},
        {
            "name": "attention",
            "role": "attention",
            "replicas": 2,
            "resources": {"cpu": "8", "memory": "64Gi", "gpu": 1},
            "env": {"B": "2", "A": "1"},
        },
        {
            "name": "ffn",
            "role": "ffn",
            "replicas": 4,
            "parallelism": {"expert": 4},
            "resources": {"cpu": "8", "memory": "64Gi", "gpu": 1},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "nodeSelector": {"gpu": "h100"},
        },
    ],
    "kubernetes": {"secretEnv": [{"name": "KEYS", "secret": "api", "key": "keys"}]},
}


def document(**extra: Any) -> LLMDeployment:
    return LLMDeployment.model_validate(
        {
            "apiVersion": "serving.antiphon.dev/v1alpha1",
            "kind": "LLMDeployment",
            "metadata": {"name": "qwen", "namespace": "models"},
            "spec": {**SPEC, **extra},
        }
    )


def rendered(value: LLMDeployment) -> dict[str, Any]:
    revision = render_revision(value, SETTINGS, Weights(claim="weights", path="qwen"))
    return children.ray_service(value, OWNER, revision, sizes_of(value), bounds(value), suspend=False)


def revisions(value: LLMDeployment) -> tuple[str, str]:
    annotations = rendered(value)["metadata"]["annotations"]
    return annotations["serving.antiphon.dev/cluster-revision"], annotations["serving.antiphon.dev/serve-revision"]


def test_rays_own_schema_takes_the_serve_configuration() -> None:
    parsed = ServeDeploySchema.model_validate(parse_yaml(rendered(document())["spec"]["serveConfigV2"]))
    (application,) = parsed.applications
    assert application.import_path == "antiphon.apps.serve_entry:build"
    sizes = {d.name: d.num_replicas for d in application.deployments}
    assert sizes == {"pool-prefill": 2, "pool-attention": 2, "pool-ffn": 4, "gateway": 1}
    options = {d.name: d.ray_actor_options for d in application.deployments}
    assert options["pool-ffn"].resources == {"pool-ffn": 1}
    assert options["pool-ffn"].num_gpus == 1


def test_the_configuration_names_the_deployments_that_the_application_has() -> None:
    value = document()
    config = parse_yaml(rendered(value)["spec"]["serveConfigV2"])
    served = LLMDeployment.model_validate(config["applications"][0]["args"]["document"])
    named = {d["name"] for d in config["applications"][0]["deployments"]}
    assert named == {pool.deployment_name for pool in plan_serve(served).pools} | {GATEWAY}


def test_rays_ports_ask_for_the_token_that_kuberay_makes() -> None:
    cluster = rendered(document())["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        (container,) = group["template"]["spec"]["containers"]
        ours = {variable["name"] for variable in container["env"]}
        assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & ours, "KubeRay would leave them as they are"
        for probe in (container["readinessProbe"], container["livenessProbe"]):
            # Answered without a token: by Ray's agent (PUBLIC_EXACT_PATHS of http_server_agent.py), or by our own gateway.
            assert probe["httpGet"]["path"] in ("/api/local_raylet_healthz", "/ready", "/health")


def test_requests_in_flight_get_the_drain_time_of_the_document_in_every_process() -> None:
    """It reached Serve and the pods, but not the gateway and the workers, which ended their streams after twenty seconds."""
    value = document(kubernetes={"drainS": 300})
    service = rendered(value)
    (application,) = parse_yaml(service["spec"]["serveConfigV2"])["applications"]
    assert BuildArgs.model_validate({k: v for k, v in application["args"].items() if k != "document"}).drain_s == 300
    assert {d["graceful_shutdown_timeout_s"] > 300 for d in application["deployments"]} == {True}
    cluster = service["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        longest = max(d["graceful_shutdown_timeout_s"] for d in application["deployments"])
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > longest


def test_a_start_that_takes_ten_minutes_on_a_busy_node_is_not_killed_and_nothing_is_told_outside() -> None:
    """On a real node with other work a head needed more than the minute that its liveness allows, and was killed each time."""
    cluster = rendered(document())["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        (container,) = group["template"]["spec"]["containers"]
        probe = container["startupProbe"]
        assert probe["httpGet"] == container["livenessProbe"]["httpGet"]
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 600
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]


def test_a_pool_of_size_zero_is_taken_by_rays_schema() -> None:
    revision = render_revision(document(), SETTINGS, None)
    config = serve_config(revision.application, {"prefill": 0, "attention": 0, "ffn": 0, "gateway": 1})
    ServeDeploySchema.model_validate(parse_yaml(config))  # raises when Ray would refuse it


def test_workers_get_a_document_that_is_valid_and_says_where_the_weights_are() -> None:
    config = parse_yaml(rendered(document())["spec"]["serveConfigV2"])
    value = LLMDeployment.model_validate(config["applications"][0]["args"]["document"])
    assert value.spec.model.uri == "/models/weights/qwen"
    assert value.spec.endpoint.host == "0.0.0.0"
    assert value.spec.gpu_budget is None


def test_secrets_are_files_and_the_deployments_key_is_in_every_pod() -> None:
    tls = {"certificateFile": "/etc/antiphon/secrets/doors.prod/tls.crt", "keyFile": "/etc/antiphon/secrets/doors.prod/tls.key"}
    kubernetes = {"secretFiles": ["doors.prod"], "keySecret": {"secret": "demo-key"}}
    value = document(kubernetes=kubernetes, endpoint={"tls": tls})
    cluster = rendered(value)["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        assert set(mounts) <= set(volumes)
        env = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert volumes["deployment-key"]["secret"]["secretName"] == "demo-key"
        path = volumes["deployment-key"]["secret"]["items"][0]["path"]
        assert env["ANTIPHON_KEY_FILE"] == f"{mounts['deployment-key']['mountPath']}/{path}"
        assert ("secret-0" in mounts) == (group is not cluster["headGroupSpec"])
        if "secret-0" in mounts:
            assert tls["keyFile"].startswith(mounts["secret-0"]["mountPath"] + "/")
        if group.get("groupName") == GATEWAY:
            assert container["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"
            waits_s = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])  # Services still send to it for a moment
            assert 0 < waits_s < pod["terminationGracePeriodSeconds"] - value.spec.kubernetes.drain_s


@given(st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_the_order_of_keys_changes_no_byte(random: Any) -> None:
    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            items = list(value.items())
            random.shuffle(items)
            return {key: shuffled(inner) for key, inner in items}
        return [shuffled(inner) for inner in value] if isinstance(value, list) else value

    again = LLMDeployment.model_validate(shuffled(document().model_dump(mode="json", by_alias=True)))
    assert canonical(rendered(again)) == canonical(rendered(document()))
    assert rendered(again)["spec"]["serveConfigV2"] == rendered(document())["spec"]["serveConfigV2"]


@pytest.mark.parametrize(
    ("change", "cluster_changes", "serve_changes"),
    [
        ({"scheduler": {"maxNumSeqs": 8}}, False, True),
        ({"gpuBudget": 40}, False, False),
        ({"rollout": {"paused": True}}, False, False),
        ({"slo": {"ttftMs": 100}}, False, False),
        ({"kubernetes": {"image": "other:1"}}, True, False),
    ],
)
def test_a_change_reaches_only_what_it_must(change: dict[str, Any], cluster_changes: bool, serve_changes: bool) -> None:
    before = document(kubernetes={})
    after = document(**{"kubernetes": {}, **change})
    (cluster, serve), (new_cluster, new_serve) = revisions(before), revisions(after)
    assert (cluster != new_cluster) is cluster_changes
    assert (serve != new_serve) is serve_changes


def test_names_of_services_fit_and_no_secret_is_in_sight() -> None:
    text = json.dumps(rendered(document()))
    assert '"secretKeyRef"' in text
    assert len(rendered(document())["metadata"]["name"]) <= 47


def test_groups_may_grow_as_far_as_the_budget_allows() -> None:
    groups = {g["groupName"]: g for g in rendered(document())["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    assert groups["ffn"]["maxReplicas"] == 32
    assert groups["ffn"]["minReplicas"] == groups["ffn"]["replicas"] == 0


def test_a_preview_lists_the_steps_before_they_happen() -> None:
    lines = preview_documents(document(), document(kubernetes={"image": "other:1"}), SETTINGS)
    assert [(line.action, line.num_gpus) for line in lines] == [("ApplyCluster", 16), ("Wait", 16), ("Wait", 8), ("Nothing", 8)]
    tight = document(kubernetes={"image": "other:1"}, gpuBudget=15)
    assert [line.action for line in preview_documents(document(), tight, SETTINGS)][:3] == ["Suspend", "Wait", "Resume"]
    grown = document()
    bigger = grown.model_copy(
        update={
            "spec": grown.spec.model_copy(
                update={"pools": (grown.spec.pools[0].model_copy(update={"replicas": 3}), *grown.spec.pools[1:])}
            )
        }
    )
    assert preview_documents(grown, bigger, SETTINGS)[0].text == "scale prefill from 2 to 3 in place"
