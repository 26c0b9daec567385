"""The RayCluster part of a RayService: a worker group per pool and one for the gateway (control speed, pure).

Group sizes are zero and only the upper bound varies: Serve's replicas make Ray's autoscaler start pods, so that scaling never
edits the cluster. Must not know: Serve's configuration.
"""

from __future__ import annotations

import math
import urllib.parse
from collections.abc import Mapping

from antiphon.core.document.pools import PoolSpec, Resources, parse_quantity
from antiphon.core.document.spec import LLMDeployment
from antiphon_operator.render.canonical import Json, fingerprint, literal
from antiphon_operator.render.names import (
    GATEWAY,
    METRICS_PORT,
    SERVE_PROXY_PORT,
    pool_resource,
)
from antiphon_operator.render.pods import CONTAINER_SECURITY, gateway_template, head_template, worker_template
from antiphon_operator.render.settings import Runtime, Settings, Weights

IDLE_TIMEOUT_S = 60
REDIS_PORT = 6379
AUTOSCALER_RESOURCES: Json = {"requests": {"cpu": "100m", "memory": "384Mi"}, "limits": {"memory": "512Mi"}}
UNBOUNDED_GROUP = 10_000  # pods of a static pool are bounded by its replicas, not by the group

# These don't replace pods when they change (KubeRay leaves them out of its own hash too).
_BOUNDS = ("replicas", "minReplicas", "maxReplicas")


def ray_cluster(
    document: LLMDeployment, settings: Settings, runtime: Runtime, weights: Weights | None, draft_weights: Weights | None = None
) -> Json:
    """``rayClusterConfig`` of ``document`` without group bounds, see ``with_bounds``."""
    groups = [
        _group(
            pool.name,
            pool.resources,
            worker_template(document, pool, runtime, weights, draft_weights),
            document.spec.kubernetes.drain_s,
        )
        for pool in document.spec.pools
    ]
    gateway = Resources(cpu=settings.gateway_cpu, memory=settings.gateway_memory)
    groups.append(
        _group(GATEWAY, gateway, gateway_template(document, settings, runtime, weights), document.spec.kubernetes.drain_s)
    )
    return _fault_tolerance(document) | {
        # Without it Ray's ports in the pods run anybody's code. KubeRay makes a token per cluster, in a Secret for its pods.
        "authOptions": {"mode": "token"},
        "rayVersion": document.spec.kubernetes.ray_version or runtime.ray_version,
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": IDLE_TIMEOUT_S,
            "resources": AUTOSCALER_RESOURCES,
            "securityContext": {key: value for key, value in CONTAINER_SECURITY.items() if key != "readOnlyRootFilesystem"},
        },
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "resources": {"CPU": "0"},  # keeps work off the head
            "rayStartParams": {"dashboard-host": "0.0.0.0", "metrics-export-port": str(METRICS_PORT)},  # noqa: S104
            "template": head_template(document, settings, runtime),
        },
        "workerGroupSpecs": groups,
    }


def _fault_tolerance(document: LLMDeployment) -> Json:
    """Where the document names a Redis, Ray's head keeps its state there too: workers go on while it is made anew."""
    url = document.spec.directory.redis_url
    if url is None:
        return {}
    parts = urllib.parse.urlsplit(url)
    options: Json = {"redisAddress": f"{parts.hostname}:{parts.port or REDIS_PORT}"}
    if parts.scheme == "rediss":
        options["redisAddress"] = f"rediss://{options['redisAddress']}"
    if parts.username:
        options["redisUsername"] = {"value": literal(urllib.parse.unquote(parts.username))}
    if parts.password:
        options["redisPassword"] = {"value": literal(urllib.parse.unquote(parts.password))}
    return {"gcsFaultToleranceOptions": options}


def _group(name: str, resources: Resources, template: Json, drain_s: float) -> Json:
    ray_resources = {"CPU": str(max(1, math.ceil(parse_quantity(resources.cpu)))), pool_resource(name): "1"}
    if resources.gpu and resources.gpu_resource == "nvidia.com/gpu":
        ray_resources["GPU"] = str(resources.gpu)
    return {
        "groupName": name,
        "numOfHosts": 1,
        "idleTimeoutSeconds": IDLE_TIMEOUT_S + int(drain_s),
        "resources": ray_resources,
        "rayStartParams": {"metrics-export-port": str(METRICS_PORT)},
        "template": template,
    }


def widest(pool: PoolSpec, gpu_budget: int | None) -> int:
    """Most pods the pool's group may ever have without editing the cluster: what the budget allows."""
    if pool.resources.gpu and gpu_budget is not None:
        return max(pool.ceiling, gpu_budget // pool.resources.gpu)
    return UNBOUNDED_GROUP


def bounds(document: LLMDeployment) -> dict[str, int]:
    """Upper bound of every worker group of ``document``."""
    limits = {pool.name: widest(pool, document.spec.gpu_budget) for pool in document.spec.pools}
    return limits | {GATEWAY: UNBOUNDED_GROUP}


def with_bounds(cluster: Json, limits: Mapping[str, int]) -> Json:
    """``cluster`` with the bounds of its groups filled in."""
    groups = [
        {**group, "replicas": 0, "minReplicas": 0, "maxReplicas": limits.get(group["groupName"], UNBOUNDED_GROUP)}
        for group in cluster["workerGroupSpecs"]
    ]
    return {**cluster, "workerGroupSpecs": groups}


def http_options() -> Json:
    """Serve's own proxy: health checks only, clients reach the gateway's ports directly."""
    return {"host": "0.0.0.0", "port": SERVE_PROXY_PORT}  # noqa: S104 - pods listen on their own address


def cluster_revision(cluster: Json) -> str:
    """Changes when, and only when, all pods must be replaced: the cluster without bounds, and Serve's fixed options."""
    groups = [{k: v for k, v in group.items() if k not in _BOUNDS} for group in cluster["workerGroupSpecs"]]
    return fingerprint({"cluster": {**cluster, "workerGroupSpecs": groups}, "http": http_options()})
