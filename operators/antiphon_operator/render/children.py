"""The RayService and what stands around it: Services, disruption budgets, network policies, ServingPools (control speed, pure).

Must not know: what exists already.
"""

from __future__ import annotations

from collections.abc import Mapping

from antiphon.core.document.policies import ScalingMode
from antiphon.core.document.pools import PoolSpec
from antiphon.core.document.spec import API_VERSION, LLMDeployment
from antiphon_operator.render.canonical import Json
from antiphon_operator.render.names import (
    AGENT_PORT,
    ANNOTATION_CLUSTER_REVISION,
    ANNOTATION_REVISION,
    ANNOTATION_SERVE_REVISION,
    DASHBOARD_PORT,
    GATEWAY,
    LABEL_DEPLOYMENT,
    LABEL_POOL,
    LABEL_ROLE,
    METRICS_PORT,
    RAY_CLUSTER_LABEL,
    SERVE_PROXY_PORT,
    common_labels,
    grpc_port,
    grpc_service,
    http_port,
    http_service,
    pool_object_name,
)
from antiphon_operator.render.ray_cluster import with_bounds
from antiphon_operator.render.revision import Revision
from antiphon_operator.render.serve import serve_config, serve_revision
from antiphon_operator.render.settings import Settings


def ray_service(
    document: LLMDeployment,
    owner: Json,
    revision: Revision,
    sizes: Mapping[str, int],
    limits: Mapping[str, int],
    *,
    suspend: bool | None,
    new_clusters: bool = True,
) -> Json:
    """The RayService that runs ``revision`` with ``sizes`` workers.

    ``suspend`` None leaves it unsaid: KubeRay before 1.7 does not know the field. ``new_clusters`` False keeps KubeRay from
    building a further cluster while a failed one is taken back.
    """
    config = serve_config(revision.application, sizes)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": _metadata(document, owner, document.metadata.name)
        | {
            "annotations": {
                ANNOTATION_REVISION: revision.name,
                ANNOTATION_CLUSTER_REVISION: revision.cluster_revision,
                ANNOTATION_SERVE_REVISION: serve_revision(config),
            }
        },
        "spec": {
            **({} if suspend is None else {"suspend": suspend}),
            "upgradeStrategy": {"type": "NewCluster" if new_clusters else "None"},
            "rayClusterDeletionDelaySeconds": int(document.spec.kubernetes.drain_s),
            "serveConfigV2": config,
            "rayClusterConfig": with_bounds(revision.ray_cluster, limits),
        },
    }


def services(document: LLMDeployment, owner: Json, active_cluster: str) -> tuple[Json, Json]:
    """The Services for HTTP and gRPC: the gateway pods of the cluster that serves, and of no other."""
    name = document.metadata.name
    selector = {LABEL_DEPLOYMENT: name, LABEL_POOL: GATEWAY}
    if active_cluster:
        selector[RAY_CLUSTER_LABEL] = active_cluster

    def service(service_name: str, port_name: str, port: int, protocol: str) -> Json:
        port_spec = {"name": port_name, "port": port, "targetPort": port_name, "protocol": "TCP", "appProtocol": protocol}
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": _metadata(document, owner, service_name),
            "spec": {"type": "ClusterIP", "selector": selector, "ports": [port_spec]},
        }

    return (
        service(http_service(name), "http", http_port(document), "http"),
        service(grpc_service(name), "grpc", grpc_port(document), "kubernetes.io/h2c"),
    )


def disruption_budgets(document: LLMDeployment, owner: Json, sizes: Mapping[str, int]) -> tuple[Json, ...]:
    """One per pool and one for the gateway: a drain takes one worker of ``sizes`` at a time.

    Of pods whose owner has no scale subresource, as a RayCluster's, Kubernetes counts with a whole minAvailable only; with
    maxUnavailable it lets no pod go at all.
    """
    groups = [*(pool.name for pool in document.spec.pools), GATEWAY]
    return tuple(
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": _metadata(document, owner, pool_object_name(document.metadata.name, group)),
            "spec": {
                "minAvailable": max(0, sizes.get(group, 0) - 1),
                "selector": {"matchLabels": {LABEL_DEPLOYMENT: document.metadata.name, LABEL_POOL: group}},
            },
        }
        for group in groups
    )


def network_policies(document: LLMDeployment, owner: Json, settings: Settings) -> tuple[Json, ...]:
    """Ingress only: pods of a deployment talk freely to each other, KubeRay reaches the head, clients the gateway."""
    if not document.spec.kubernetes.network_policy:
        return ()
    name = document.metadata.name
    own = {"matchLabels": {LABEL_DEPLOYMENT: name}}
    anywhere: Json = {"namespaceSelector": {}}
    kuberay = anywhere | {"podSelector": {"matchLabels": dict(settings.kuberay_labels)}}
    scrapers: Json = {"namespaceSelector": {}}
    if settings.metrics_namespace_labels:
        scrapers = {"namespaceSelector": {"matchLabels": dict(settings.metrics_namespace_labels)}}

    def policy(policy_name: str, selector: Json, ingress: list[Json]) -> Json:
        return {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": _metadata(document, owner, policy_name),
            "spec": {"podSelector": selector, "policyTypes": ["Ingress"], "ingress": ingress},
        }

    return (
        policy(
            f"{name}-pods",
            own,
            [
                {"from": [{"podSelector": own}]},
                {"from": [kuberay], "ports": _ports(DASHBOARD_PORT, AGENT_PORT, SERVE_PROXY_PORT)},
                {"from": [scrapers], "ports": _ports(METRICS_PORT)},
            ],
        ),
        policy(
            f"{name}-gateway",
            {"matchLabels": {LABEL_DEPLOYMENT: name, LABEL_POOL: GATEWAY}},
            [{"ports": _ports(http_port(document), grpc_port(document))}],
        ),
    )


def serving_pool(document: LLMDeployment, owner: Json, pool: PoolSpec) -> Json:
    """The ServingPool of ``pool``; ``replicas`` only when nobody else decides them."""
    spec: Json = {
        "deployment": document.metadata.name,
        "pool": pool.name,
        "role": pool.role,
        "mode": pool.scaling.mode.value,
        "minReplicas": pool.floor,
        "maxReplicas": pool.ceiling,
    }
    if pool.scaling.mode is ScalingMode.STATIC:
        spec["replicas"] = pool.replicas
    name = pool_object_name(document.metadata.name, pool.name)
    metadata = _metadata(document, owner, name)
    metadata["labels"] |= {LABEL_POOL: pool.name, LABEL_ROLE: pool.role}
    return {"apiVersion": API_VERSION, "kind": "ServingPool", "metadata": metadata, "spec": spec}


def pool_selector(document: LLMDeployment, pool: PoolSpec) -> str:
    """Label selector of the pool's pods, as an autoscaler reads it."""
    return f"{LABEL_DEPLOYMENT}={document.metadata.name},{LABEL_POOL}={pool.name}"


def _metadata(document: LLMDeployment, owner: Json, name: str) -> Json:
    return {
        "name": name,
        "namespace": document.metadata.namespace,
        "labels": common_labels(document),
        "ownerReferences": [owner],
    }


def _ports(*numbers: int) -> list[Json]:
    return [{"port": number, "protocol": "TCP"} for number in sorted(set(numbers))]
