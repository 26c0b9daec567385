"""Serve's configuration: one application per document, a Serve deployment per pool and one for the gateway (control speed, pure).

The document that workers get leaves out sizes and everything the operator acts on itself, so that scaling changes only
``num_replicas`` and never restarts a worker. Must not know: the RayCluster.
"""

from __future__ import annotations

from collections.abc import Mapping

from antiphon.core.document.part import REVISION_ANNOTATION
from antiphon.core.document.pools import PoolSpec, Resources, parse_quantity
from antiphon.core.document.spec import LLMDeployment
from antiphon_operator.render.canonical import Json, fingerprint, to_yaml
from antiphon_operator.render.names import (
    GATEWAY,
    IMPORT_PATH,
    group_of,
    grpc_port,
    http_port,
    pool_resource,
    replicas_service,
    serve_deployment,
)
from antiphon_operator.render.ray_cluster import http_options
from antiphon_operator.render.settings import Settings, Weights

# What the operator acts on itself; workers must not restart when it changes.
OPERATOR_FIELDS = ("slo", "ratios", "gpu_budget", "rollout", "suspend", "kubernetes", "planning")
POOL_OPERATOR_FIELDS = ("scaling", "tolerations", "node_selector", "replicas", "cores")
STOP_MARGIN_S = 10.0  # a replica gets this much longer than the requests in it, before Serve kills it
_ANY_ADDRESS = "0.0.0.0"  # noqa: S104 - pods listen on their own address


def worker_document(document: LLMDeployment, weights: Weights | None, draft_weights: Weights | None = None) -> Json:
    """The document as workers read it: sizes at one copy, pod addresses, the weights' places in the pod."""
    fields = document.spec.model_fields_set | set(type(document.spec).model_fields)
    spec: Json = document.spec.model_dump(
        mode="json", by_alias=True, exclude_none=True, exclude=set(OPERATOR_FIELDS) & fields | {"pools"}
    )
    spec["pools"] = [
        pool.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=set(POOL_OPERATOR_FIELDS))
        | {"replicas": pool.parallelism.num_shards}
        for pool in document.spec.pools
    ]
    spec["endpoint"] |= {
        "host": _ANY_ADDRESS,
        "httpPort": http_port(document),
        "grpcPort": grpc_port(document),
        "replicas": 1,
    }
    gateway = document.spec.kubernetes.gateway
    if gateway is not None and gateway.inference_pool:
        namespace = document.metadata.namespace or "default"
        where = f"{replicas_service(document.metadata.name)}.{namespace}.svc:{http_port(document)}"
        spec["endpoint"]["pickerTargets"] = where
    if document.spec.wake_timeout_s > 0:
        spec["endpoint"]["wakeTimeoutS"] = document.spec.wake_timeout_s  # the gateway does not see which pools may sleep
    if weights is not None:
        spec["model"]["uri"] = weights.directory
    if draft_weights is not None:
        spec["speculation"]["model"]["uri"] = draft_weights.directory
    metadata: Json = {"name": document.metadata.name}
    if document.metadata.namespace is not None:
        metadata["namespace"] = document.metadata.namespace
    return {"apiVersion": document.api_version, "kind": document.kind, "metadata": metadata, "spec": spec}


def application(document: LLMDeployment, settings: Settings, weights: Weights | None, draft_weights: Weights | None = None) -> Json:
    """The Serve application of ``document`` without sizes, see ``serve_config``."""
    drain_s = document.spec.kubernetes.drain_s
    deployments = [_deployment(pool.name, pool.resources, drain_s) for pool in document.spec.pools]
    deployments.append(_deployment(GATEWAY, Resources(cpu=settings.gateway_cpu, memory=settings.gateway_memory), drain_s))
    value = worker_document(document, weights, draft_weights)
    # Every part tells it on: whether a change in place has reached them all is known by nothing else.
    value["metadata"]["annotations"] = {REVISION_ANNOTATION: fingerprint([value, drain_s])}
    return {
        "name": document.metadata.name,
        "import_path": IMPORT_PATH,
        "route_prefix": None,  # the gateway opens its own ports
        "args": {"document": value, "drain_s": drain_s},
        "deployments": deployments,
    }


def _deployment(name: str, resources: Resources, drain_s: float) -> Json:
    options: Json = {"num_cpus": parse_quantity(resources.cpu), "resources": {pool_resource(name): 1}}
    if resources.gpu and resources.gpu_resource == "nvidia.com/gpu":
        options["num_gpus"] = resources.gpu
    return {"name": serve_deployment(name), "ray_actor_options": options, "graceful_shutdown_timeout_s": drain_s + STOP_MARGIN_S}


def serve_config(application_: Json, sizes: Mapping[str, int]) -> str:
    """``serveConfigV2`` with ``sizes`` workers per pool and gateway; equal inputs give equal bytes.

    Serve refuses zero replicas: a pool of size zero sleeps under Serve's own scale-to-zero.
    """
    deployments = [deployment | _size(sizes[group_of(deployment["name"])]) for deployment in application_["deployments"]]
    config = {
        "proxy_location": "HeadOnly",
        "http_options": http_options(),
        "applications": [{**application_, "deployments": deployments}],
    }
    return to_yaml(config)


def _size(replicas: int) -> Json:
    if replicas > 0:
        return {"num_replicas": replicas}
    return {"autoscaling_config": {"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1}}


def serve_revision(config: str) -> str:
    """Changes with every byte of ``serveConfigV2``."""
    return fingerprint(config)


def source_fingerprint(document: LLMDeployment, weights: Weights | None, draft_weights: Weights | None = None) -> str:
    """Names the revision: all of the document that reaches workers or pods, sizes and the operator's own policies aside.

    Only fields that the document sets count, so that a newer operator with more defaults makes no new revision.
    """
    spec: Json = document.spec.model_dump(
        mode="json", by_alias=True, exclude_defaults=True, exclude={"slo", "ratios", "gpu_budget", "rollout", "suspend"}
    )
    spec.pop("planning", None)
    spec.get("endpoint", {}).pop("replicas", None)
    for pool in spec["pools"]:
        for key in ("scaling", "replicas", "cores"):
            pool.pop(key, None)
    kubernetes = spec.get("kubernetes", {})
    kubernetes.pop("networkPolicy", None)
    route = kubernetes.pop("gateway", None)
    if route is not None and route.get("inferencePool"):
        kubernetes["inferencePool"] = True  # the gateways answer a picker's protocol then
    if route is not None and not kubernetes:
        del spec["kubernetes"]
    place = None if weights is None else [weights.claim, weights.path]
    drafts = [] if draft_weights is None else [[draft_weights.claim, draft_weights.path]]
    return fingerprint([document.metadata.name, spec, place, *drafts])


def sizes_of(document: LLMDeployment) -> dict[str, int]:
    """The sizes that the document itself asks for, the gateway included."""
    return {pool.name: _initial(pool) for pool in document.spec.pools} | {GATEWAY: document.spec.endpoint.replicas}


def _initial(pool: PoolSpec) -> int:
    return min(max(pool.replicas, pool.floor), pool.ceiling)
