"""The HTTPRoute by which a Gateway of the cluster leads to a deployment's HTTP API (control speed, pure).

Must not know: which gateway implementation there is.
"""

from __future__ import annotations

from antiphon.core.document.spec import LLMDeployment
from antiphon_operator.render.canonical import Json
from antiphon_operator.render.names import common_labels, http_port, http_service

API_VERSION = "gateway.networking.k8s.io/v1"


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
                "backendRefs": [{"name": http_service(name), "port": http_port(document)}],
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
