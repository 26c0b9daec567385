"""The kinds the operator reads and writes, and how each is addressed (control speed, values).

Must not know: any client.
"""

from __future__ import annotations

from dataclasses import dataclass

from antiphon.core.document.spec import GROUP, VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """How a kind is addressed."""

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """Group and version as an object's apiVersion."""
        return f"{self.group}/{self.version}" if self.group else self.version


def _ours(kind: str, plural: str) -> Resource:
    return Resource(group=GROUP, version=VERSION, kind=kind, plural=plural)


LLM_DEPLOYMENT = _ours("LLMDeployment", "llmdeployments")
SERVING_POOL = _ours("ServingPool", "servingpools")
COMPOSITION = _ours("CompositionOfExperts", "compositionsofexperts")
MODEL_ARTIFACT = _ours("ModelArtifact", "modelartifacts")
RAY_SERVICE = Resource(group="ray.io", version="v1", kind="RayService", plural="rayservices")
RAY_CLUSTER = Resource(group="ray.io", version="v1", kind="RayCluster", plural="rayclusters")
POD = Resource(group="", version="v1", kind="Pod", plural="pods")
SERVICE = Resource(group="", version="v1", kind="Service", plural="services")
CONFIG_MAP = Resource(group="", version="v1", kind="ConfigMap", plural="configmaps")
EVENT = Resource(group="", version="v1", kind="Event", plural="events")
CLAIM = Resource(group="", version="v1", kind="PersistentVolumeClaim", plural="persistentvolumeclaims")
JOB = Resource(group="batch", version="v1", kind="Job", plural="jobs")
DEPLOYMENT = Resource(group="apps", version="v1", kind="Deployment", plural="deployments")
CONTROLLER_REVISION = Resource(group="apps", version="v1", kind="ControllerRevision", plural="controllerrevisions")
DISRUPTION_BUDGET = Resource(group="policy", version="v1", kind="PodDisruptionBudget", plural="poddisruptionbudgets")
NETWORK_POLICY = Resource(group="networking.k8s.io", version="v1", kind="NetworkPolicy", plural="networkpolicies")
HTTP_ROUTE = Resource(group="gateway.networking.k8s.io", version="v1", kind="HTTPRoute", plural="httproutes")
INFERENCE_POOL = Resource(group="inference.networking.k8s.io", version="v1", kind="InferencePool", plural="inferencepools")
LEASE = Resource(group="coordination.k8s.io", version="v1", kind="Lease", plural="leases")

RESOURCES: tuple[Resource, ...] = (
    LLM_DEPLOYMENT,
    SERVING_POOL,
    COMPOSITION,
    MODEL_ARTIFACT,
    RAY_SERVICE,
    RAY_CLUSTER,
    POD,
    SERVICE,
    CONFIG_MAP,
    EVENT,
    CLAIM,
    JOB,
    DEPLOYMENT,
    CONTROLLER_REVISION,
    DISRUPTION_BUDGET,
    NETWORK_POLICY,
    HTTP_ROUTE,
    INFERENCE_POOL,
    LEASE,
)
_BY_KIND = {(resource.api_version, resource.kind): resource for resource in RESOURCES}


def resource_of(api_version: str, kind: str) -> Resource:
    """The resource of an object.

    Raises:
        KeyError: the operator has no business with that kind.
    """
    return _BY_KIND[api_version, kind]
