"""Objects of the Gateway API that lead to a deployment, whose kinds a cluster may lack (control speed).

The status remembers which there are, so that one that is no longer asked for is deleted without a list. Must not know: gateways.
"""

from __future__ import annotations

from dataclasses import dataclass

from antiphon.core.document.spec import LLMDeployment
from antiphon_operator.api.conditions import Reason
from antiphon_operator.kube.base import Kube, NotFound, Object, controller_of, name_of
from antiphon_operator.kube.resources import HTTP_ROUTE, INFERENCE_POOL, Resource
from antiphon_operator.reconcile.writer import Unapplied, Writer
from antiphon_operator.render.canonical import Json
from antiphon_operator.render.route import http_route, inference_pool


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayObjects:
    """Names of what there is; empty = nothing of that kind."""

    route: str = ""
    pool: str = ""


async def apply_gateway_objects(
    kube: Kube, writer: Writer, document: LLMDeployment, owner: Json, *, active_cluster: str, before: GatewayObjects
) -> GatewayObjects:
    """Bring HTTPRoute and InferencePool to what the document asks for.

    Raises:
        KubeError: the API server failed; try again.
    """
    asked = inference_pool(document, owner, active_cluster)
    namespace = document.metadata.namespace or "default"
    pool = await _apply(kube, writer, namespace, INFERENCE_POOL, None if asked is None else asked[0], before.pool)
    route = await _apply(kube, writer, namespace, HTTP_ROUTE, http_route(document, owner), before.route)
    return GatewayObjects(route=route, pool=pool)


async def _apply(kube: Kube, writer: Writer, namespace: str, resource: Resource, value: Object | None, before: str) -> str:
    if value is None:
        if before:
            live = await kube.get(resource, namespace, before)
            if live is not None and controller_of(live) == writer.owner_uid:
                await kube.delete(resource, namespace, before, uid=live["metadata"]["uid"])
        return ""
    try:
        await writer.ensure(value)
    except NotFound:
        missing = f"kubernetes.gateway: the API server knows no {resource.kind} of {resource.api_version}"
        writer.unapplied.append(Unapplied(reason=Reason.GATEWAY_API_MISSING, message=missing))
        return before
    return name_of(value)
