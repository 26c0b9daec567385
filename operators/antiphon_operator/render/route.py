"""The HTTPRoute by which a Gateway of the cluster leads to a deployment's HTTP API, and its InferencePool (control speed, pure).

Must not know: which gateway implementation there is.
"""

from __future__ import annotations

from antiphon.core.document.spec import LLMDeployment
from antiphon_operator.render.canonical import Json
from antiphon_operator.render.names import (
    GATEWAY,
    LABEL_DEPLOYMENT,
    LABEL_POOL,
    RAY_CLUSTER_LABEL,
    common_labels,
    grpc_port,
    grpc_service,
    http_port,
    http_service,
    replicas_service,
)

API_VERSION = "gateway.networking.k8s.io/v1"
POOL_GROUP = "inference.networking.k8s.io"
POOL_API_VERSION = f"{POOL_GROUP}/v1"


def route_name(deployment: str) -> str:
    """Name of the HTTPRoute."""
    return f"{deployment}-http"


def http_route(document: LLMDeployment, owner: Json) -> Json | None:
    """The HTTPRoute that the document asks for; None when it asks for none."""
    gateway = document.spec.kubernetes.gateway
    if gateway is None:
        return None
    name = document.metadata.name
    spec: Json = {
        "parentRefs": [parent.model_dump(mode="json", by_alias=True, exclude_none=True) for parent in gateway.parent_refs],
        "rules": [
            {
                "matches": [{"path": {"type": "PathPrefix", "value": "/v1"}}],
                "backendRefs": [_backend(document)],
                # A stream lasts as long as its request: the gateway must not end it before the deployment does.
                "timeouts": {"request": f"{int(document.spec.endpoint.default_deadline_s)}s"},
            }
        ],
    }
    if gateway.hostnames:
        spec["hostnames"] = list(gateway.hostnames)
    metadata = {
        "name": route_name(name),
        "namespace": document.metadata.namespace,
        "labels": common_labels(document),
        "ownerReferences": [owner],
    }
    return {"apiVersion": API_VERSION, "kind": "HTTPRoute", "metadata": metadata, "spec": spec}


def inference_pool(document: LLMDeployment, owner: Json, active_cluster: str) -> tuple[Json, Json] | None:
    """The InferencePool of the gateway replicas and the headless Service that resolves to them; None when it is not asked for.

    A gateway of the cluster asks the picker, which each replica is, where to send a request; while none answers it chooses.
    """
    gateway = document.spec.kubernetes.gateway
    if gateway is None or not gateway.inference_pool:
        return None
    name = document.metadata.name
    selector = {LABEL_DEPLOYMENT: name, LABEL_POOL: GATEWAY}
    if active_cluster:
        selector[RAY_CLUSTER_LABEL] = active_cluster
    metadata = {"namespace": document.metadata.namespace, "labels": common_labels(document), "ownerReferences": [owner]}
    pool = {
        "apiVersion": POOL_API_VERSION,
        "kind": "InferencePool",
        "metadata": {"name": pool_name(name), **metadata},
        "spec": {
            "selector": {"matchLabels": selector},
            "targetPorts": [{"number": http_port(document)}],
            "endpointPickerRef": {
                "group": "",
                "kind": "Service",
                "name": grpc_service(name),
                "port": {"number": grpc_port(document)},
                "failureMode": "FailOpen",
            },
        },
    }
    port = {"name": "http", "port": http_port(document), "targetPort": "http", "protocol": "TCP"}
    replicas = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": replicas_service(name), **metadata},
        "spec": {"type": "ClusterIP", "clusterIP": "None", "selector": selector, "ports": [port]},
    }
    return pool, replicas


def pool_name(deployment: str) -> str:
    """Name of the InferencePool."""
    return f"{deployment}-gateways"


def _backend(document: LLMDeployment) -> Json:
    name = document.metadata.name
    gateway = document.spec.kubernetes.gateway
    if gateway is not None and gateway.inference_pool:
        return {"group": POOL_GROUP, "kind": "InferencePool", "name": pool_name(name)}
    return {"name": http_service(name), "port": http_port(document)}
