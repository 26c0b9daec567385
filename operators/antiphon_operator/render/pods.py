"""Pod templates of head and workers, fit for the restricted pod-security profile (control speed, pure).

Every field the API server would default inside a list is written out where comparing needs it. Must not know: Ray Serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from antiphon.core.document.policies import KubernetesSpec, TolerationSpec
from antiphon.core.document.pools import PoolSpec, Resources, parse_quantity
from antiphon.core.document.spec import LLMDeployment, LLMDeploymentSpec
from antiphon.core.ids import Role
from antiphon_operator.planning.memory import NOTHING_KNOWN, memory_need
from antiphon_operator.render.canonical import Json, literal
from antiphon_operator.render.names import (
    AGENT_PORT,
    DASHBOARD_PORT,
    GATEWAY,
    GCS_PORT,
    HEAD_GROUP,
    HEALTH_PATH,
    LABEL_POOL,
    LABEL_ROLE,
    METRICS_PORT,
    RAY_CLIENT_PORT,
    RAYLET_HEALTH_PATH,
    SERVE_PROXY_PORT,
    common_labels,
    grpc_port,
    http_port,
)
from antiphon_operator.render.settings import Runtime, Settings, Weights

CONTAINER_SECURITY: Json = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
POD_SECURITY: Json = {"runAsNonRoot": True, "fsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
SECRETS = "/etc/antiphon/secrets"
_KEY_DIRECTORY = "/etc/antiphon/key"
_KEY_FILE = "key"
_SECRET_MODE = 0o440
_SHM_DEFAULT_BYTES = 1 << 30
_ENVIRONMENT = {
    # Libraries ask who the user is; the id that a cluster picks is in no passwd file.
    "LOGNAME": "antiphon",
    # A pod holds one worker and its limit is computed for it. Ray's monitor would count pages of checkpoints that the kernel can
    # take back at any time, and kill the worker at 95 % of the pod.
    "RAY_memory_monitor_refresh_ms": "0",
    # What is served here is told to nobody.
    "RAY_USAGE_STATS_ENABLED": "0",
}
GRACE_MARGIN_S = 30
_UNKNOWN_S = 5  # seconds until a Service's addresses have changed everywhere
_START_PROBES = 180  # of five seconds each


def resource_requirements(resources: Resources) -> Json:
    """Requests equal to limits, so that workers get whole processors and are not evicted first."""
    amounts: Json = {"cpu": resources.cpu}
    if resources.memory is not None:
        amounts["memory"] = resources.memory
    if resources.gpu:
        amounts[resources.gpu_resource] = str(resources.gpu)
    return {"requests": amounts, "limits": dict(amounts)}


def worker_requirements(spec: LLMDeploymentSpec, pool: PoolSpec) -> Json:
    """What one worker's pod asks for; without memory in the document, what is known to be needed is asked for, without a limit."""
    out = resource_requirements(pool.resources)
    if pool.resources.memory is None:
        out["requests"]["memory"] = str(memory_need(spec, pool, NOTHING_KNOWN).total)
    return out


def companion_requirements(cpu: str, memory: str) -> Json:
    """What head and gateway ask for: little of the processors, and more of them when they are free."""
    return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": memory}}


def worker_template(
    document: LLMDeployment, pool: PoolSpec, runtime: Runtime, weights: Weights | None, draft_weights: Weights | None = None
) -> Json:
    """The pod template of one pool's worker group; only workers that generate load a draft model."""
    mounted = [weights, draft_weights if Role(pool.role).generates else None]
    probe = {"httpGet": {"path": RAYLET_HEALTH_PATH, "port": AGENT_PORT}}
    return _template(
        document,
        group=pool.name,
        role=pool.role,
        container=_container(
            document, "ray-worker", pool.name, runtime, worker_requirements(document.spec, pool), mounted, env=pool.env
        )
        | {"ports": [_port("metrics", METRICS_PORT)], "readinessProbe": _probe(probe), **_alive(probe)},
        weights=mounted,
        shm_bytes=_shm_bytes(pool.resources.memory),
        node_selector=pool.node_selector,
        tolerations=pool.tolerations,
        token=False,
    )


def gateway_template(document: LLMDeployment, settings: Settings, runtime: Runtime, weights: Weights | None) -> Json:
    """The pod template of the gateway's worker group; it is ready when the gateway answers."""
    requirements = companion_requirements(settings.gateway_cpu, settings.gateway_memory)
    ready: Json = {"httpGet": {"path": HEALTH_PATH, "port": http_port(document)}}
    if document.spec.endpoint.tls is not None:
        ready["httpGet"]["scheme"] = "HTTPS"
    alive = {"httpGet": {"path": RAYLET_HEALTH_PATH, "port": AGENT_PORT}}
    return _template(
        document,
        group=GATEWAY,
        role=GATEWAY,
        container=_container(document, "ray-worker", GATEWAY, runtime, requirements, [weights], env={})
        | {
            "ports": [
                _port("metrics", METRICS_PORT),
                _port("http", http_port(document)),
                _port("grpc", grpc_port(document)),
            ],
            "readinessProbe": _probe(ready),
            **_alive(alive),
            # Requests that come until every node knows that it is going are still taken; within the grace period's margin.
            "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(_UNKNOWN_S)]}}},
        },
        weights=[weights],
        shm_bytes=_SHM_DEFAULT_BYTES,
        node_selector={},
        tolerations=(),
        token=False,
    )


def head_template(document: LLMDeployment, settings: Settings, runtime: Runtime) -> Json:
    """The pod template of Ray's head; its autoscaler needs the token of the account KubeRay makes for it."""
    requirements = companion_requirements(settings.head_cpu, settings.head_memory)
    alive = {"httpGet": {"path": RAYLET_HEALTH_PATH, "port": AGENT_PORT}}
    return _template(
        document,
        group=HEAD_GROUP,
        role="head",
        container=_container(document, "ray-head", HEAD_GROUP, runtime, requirements, [], env={})
        | {
            "ports": [
                _port("gcs", GCS_PORT),
                _port("dashboard", DASHBOARD_PORT),
                _port("client", RAY_CLIENT_PORT),
                _port("metrics", METRICS_PORT),
                _port("serve", SERVE_PROXY_PORT),
            ],
            # KubeRay's own probes of older Rays need wget in the image.
            "readinessProbe": _probe(alive),
            **_alive(alive),
        },
        weights=[],
        shm_bytes=_SHM_DEFAULT_BYTES,
        node_selector={},
        tolerations=(),
        token=True,
    )


def _claims(weights: Sequence[Weights | None]) -> dict[str, Weights]:
    """Claims by the name of their volume, each once: the model's first, then the draft model's."""
    found: dict[str, Weights] = {}
    for name, each in zip(("weights", "draft-weights"), weights, strict=False):
        if each is not None and each.claim not in {other.claim for other in found.values()}:
            found[name] = each
    return found


def tolerations(specs: tuple[TolerationSpec, ...]) -> list[Json]:
    """Tolerations as the API server takes them."""
    return [spec.model_dump(mode="json", by_alias=True, exclude_none=True) for spec in specs]


def _template(
    document: LLMDeployment,
    *,
    group: str,
    role: str,
    container: Json,
    weights: Sequence[Weights | None],
    shm_bytes: int,
    node_selector: dict[str, str],
    tolerations: tuple[TolerationSpec, ...],
    token: bool,
) -> Json:
    kubernetes = document.spec.kubernetes
    spec: Json = {
        "containers": [container],
        "securityContext": POD_SECURITY,
        "terminationGracePeriodSeconds": int(kubernetes.drain_s) + GRACE_MARGIN_S,
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": str(shm_bytes)}},
        ],
    }
    for volume, each in _claims(weights).items():
        claim = {"claimName": each.claim, "readOnly": True}
        spec["volumes"].append({"name": volume, "persistentVolumeClaim": claim})
    spec["volumes"] += secret_files(_secret_files(document, group)).volumes + deployment_key(kubernetes).volumes
    if not token:
        spec["automountServiceAccountToken"] = False
    if node_selector:
        spec["nodeSelector"] = dict(node_selector)
    if tolerations:
        spec["tolerations"] = [t.model_dump(mode="json", by_alias=True, exclude_none=True) for t in tolerations]
    return {
        "metadata": {"labels": common_labels(document) | {LABEL_POOL: group, LABEL_ROLE: role}},
        "spec": spec | _from_kubernetes(kubernetes, token=token),
    }


def _from_kubernetes(kubernetes: KubernetesSpec, *, token: bool) -> Json:
    out: Json = {}
    if kubernetes.image_pull_secrets:
        out["imagePullSecrets"] = [{"name": name} for name in kubernetes.image_pull_secrets]
    if kubernetes.service_account_name is not None and not token:
        out["serviceAccountName"] = kubernetes.service_account_name
    if kubernetes.priority_class_name is not None:
        out["priorityClassName"] = kubernetes.priority_class_name
    return out


def _container(
    document: LLMDeployment,
    name: str,
    pool: str,
    runtime: Runtime,
    resources: Json,
    weights: Sequence[Weights | None],
    *,
    env: dict[str, str],
) -> Json:
    kubernetes = document.spec.kubernetes
    variables: list[Json] = [
        {"name": "ANTIPHON_DEPLOYMENT", "value": document.metadata.name},
        {"name": "ANTIPHON_POOL", "value": pool},
        {"name": "HOME", "value": "/tmp"},  # noqa: S108 - an emptyDir of the pod's own
    ]
    variables += [{"name": key, "value": literal(value)} for key, value in sorted((_ENVIRONMENT | env).items())]
    variables += [
        {"name": ref.name, "valueFrom": {"secretKeyRef": {"name": ref.secret, "key": ref.key}}}
        for ref in sorted(kubernetes.secret_env, key=lambda ref: ref.name)
    ]
    if document.spec.directory.redis_url is not None:
        variables.append({"name": "ANTIPHON_NAMESPACE", "value": document.metadata.namespace or "default"})
    mounts: list[Json] = [
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
    ]
    for volume, each in _claims(weights).items():
        mounts.append({"name": volume, "mountPath": each.mount, "readOnly": True})
    key = deployment_key(kubernetes)
    mounts += secret_files(_secret_files(document, pool)).mounts + key.mounts
    variables += key.variables
    return {
        "name": name,
        "image": kubernetes.image if kubernetes.image is not None else runtime.image,
        "imagePullPolicy": kubernetes.image_pull_policy,
        "env": variables,
        "resources": resources,
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": mounts,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class FromSecrets:
    """What a pod has from Secrets."""

    volumes: list[Json] = field(default_factory=list)
    mounts: list[Json] = field(default_factory=list)
    variables: list[Json] = field(default_factory=list)


def secret_files(names: Sequence[str]) -> FromSecrets:
    """Secrets as directories of files, below ``SECRETS``."""
    volumes: list[Json] = []
    mounts: list[Json] = []
    for index, name in enumerate(names):
        volumes.append({"name": f"secret-{index}", "secret": {"secretName": name, "defaultMode": _SECRET_MODE}})
        mounts.append({"name": f"secret-{index}", "mountPath": f"{SECRETS}/{name}", "readOnly": True})
    return FromSecrets(volumes=volumes, mounts=mounts)


def deployment_key(kubernetes: KubernetesSpec) -> FromSecrets:
    """The key by which parts of a deployment know each other; nothing where the document names none."""
    if kubernetes.key_secret is None:
        return FromSecrets()
    items = [{"key": kubernetes.key_secret.key, "path": _KEY_FILE}]
    source = {"secretName": kubernetes.key_secret.secret, "items": items, "defaultMode": _SECRET_MODE}
    return FromSecrets(
        volumes=[{"name": "deployment-key", "secret": source}],
        mounts=[{"name": "deployment-key", "mountPath": _KEY_DIRECTORY, "readOnly": True}],
        variables=[{"name": "ANTIPHON_KEY_FILE", "value": f"{_KEY_DIRECTORY}/{_KEY_FILE}"}],
    )


def _secret_files(document: LLMDeployment, group: str) -> tuple[str, ...]:
    """Secrets whose files a group's pods have: the head asks for none."""
    return () if group == HEAD_GROUP else document.spec.kubernetes.secret_files


def _port(name: str, number: int) -> Json:
    return {"name": name, "containerPort": number, "protocol": "TCP"}


def _probe(handler: Json, failures: int = 3) -> Json:
    return handler | {"initialDelaySeconds": 5, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": failures}


def _alive(handler: Json) -> Json:
    """Restarts what hangs, but not what starts slowly: on a busy node Ray's processes took longer than a minute to come up."""
    return {"livenessProbe": _probe(handler, 12), "startupProbe": _probe(handler, _START_PROBES)}


def _shm_bytes(memory: str | None) -> int:
    return _SHM_DEFAULT_BYTES if memory is None else int(parse_quantity(memory) // 4)
