"""Just enough of KubeRay's kinds for a bare API server to keep them: any spec, a status subresource (control speed, data). Shipped.

Their own definitions are a megabyte and come with KubeRay. Must not know: what is in a RayService.
"""

from __future__ import annotations

from typing import Any

from antiphon_operator.kube.resources import RAY_CLUSTER, RAY_SERVICE, Resource


def ray_definitions() -> tuple[dict[str, Any], ...]:
    """CustomResourceDefinitions of RayService and RayCluster."""
    return tuple(_definition(resource) for resource in (RAY_SERVICE, RAY_CLUSTER))


def _definition(resource: Resource) -> dict[str, Any]:
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    schema = {"type": "object", "properties": {"spec": anything, "status": anything}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{resource.plural}.{resource.group}"},
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
