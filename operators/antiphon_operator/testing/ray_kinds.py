"""Just enough of others' kinds for a bare API server to keep them: any spec, a status subresource (control speed, data). Shipped.

Their own definitions are a megabyte and come with KubeRay and with the Gateway API. Must not know: what is in a RayService.
"""

from __future__ import annotations

from typing import Any

from antiphon_operator.kube.resources import HTTP_ROUTE, INFERENCE_POOL, RAY_CLUSTER, RAY_SERVICE, Resource


def ray_definitions() -> tuple[dict[str, Any], ...]:
    """CustomResourceDefinitions of RayService and RayCluster."""
    return tuple(_definition(resource) for resource in (RAY_SERVICE, RAY_CLUSTER))


def gateway_definitions() -> tuple[dict[str, Any], ...]:
    """CustomResourceDefinitions of HTTPRoute and InferencePool."""
    return tuple(_definition(resource) for resource in (HTTP_ROUTE, INFERENCE_POOL))


def _definition(resource: Resource) -> dict[str, Any]:
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    schema = {"type": "object", "properties": {"spec": anything, "status": anything}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{resource.plural}.{resource.group}",
            # A group of Kubernetes' own is refused without the review of its API; this one has none.
            "annotations": {"api-approved.kubernetes.io": "unapproved, for tests"} if resource.group.endswith("k8s.io") else {},
        },
        "spec": {
            "group": resource.group,
            "scope": "Namespaced",
            "names": {
                "kind": resource.kind,
                "listKind": f"{resource.kind}List",
                "plural": resource.plural,
                "singular": resource.kind.lower(),
            },
            "versions": [
                {
                    "name": resource.version,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": schema},
                    "subresources": {"status": {}},
                }
            ],
        },
    }
