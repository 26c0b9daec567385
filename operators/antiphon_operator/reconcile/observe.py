"""Reads RayServices, RayClusters and pods into plain values (control speed, pure).

A status string of KubeRay's or Ray's that we don't know means progress, never an error. Must not know: what is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from antiphon.core.document.part import REVISION_ANNOTATION
from antiphon_operator.kube.base import Object
from antiphon_operator.render.canonical import parse_yaml
from antiphon_operator.render.names import (
    ANNOTATION_CLUSTER_REVISION,
    ANNOTATION_REVISION,
    LABEL_POOL,
    RAY_CLUSTER_LABEL,
    group_of,
)

_GOOD_DEPLOYMENT = ("HEALTHY", "UPSCALING", "DOWNSCALING")
_BAD_APPLICATION = ("DEPLOY_FAILED", "UNHEALTHY")
_BAD_DEPLOYMENT = ("UNHEALTHY", "DEPLOY_FAILED")
_SAID = 400  # characters of what Serve says: a condition's message holds 1000, and several may fail
_CRASHES = ("CrashLoopBackOff", "ImagePullBackOff", "ErrImagePull", "CreateContainerConfigError", "InvalidImageName")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayServiceView:
    """What a RayService says."""

    revision: str
    cluster_revision: str
    suspend: bool
    suspended: bool
    suspend_ignored: bool  # KubeRay has read it and has not begun, as one that does not know it
    current: bool  # its status speaks of its present spec
    ready: bool  # KubeRay's own word: at least one endpoint
    upgrading: bool
    active: str
    pending: str
    sizes: Mapping[str, int]  # asked of Serve
    told_revision: str  # what parts that run its configuration call that; "" = they don't say
    running: bool  # all applications and deployments are well
    resizing: bool  # all deployments are well, and applications are at most on their way to another size
    unhealthy: tuple[str, ...]  # what is not, for people
    problem: str  # a validation failure that KubeRay does not retry


@dataclass(frozen=True, slots=True, kw_only=True)
class PodView:
    """One worker, gateway or head pod."""

    name: str
    pool: str
    cluster: str
    ready: bool
    scheduled: bool
    started: bool
    terminating: bool
    gpus: int
    unschedulable: str = ""
    crash: str = ""
    address: str = ""
    ended: bool = False  # phase Failed: it holds nothing any more, and another one must come


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """One RayCluster."""

    name: str
    cluster_revision: str
    resource_version: str
    bounds: Mapping[str, tuple[int, int]]  # group -> (position, maxReplicas)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Everything seen of one deployment."""

    service: RayServiceView | None
    clusters: tuple[ClusterView, ...] = ()
    pods: tuple[PodView, ...] = field(default=())
    unproven: str = ""  # what keeps the applied revision from being proven to run in all parts; "" = nothing does

    def ready(self, pool: str, cluster: str) -> int:
        """Ready pods of ``pool`` in ``cluster``."""
        return sum(1 for pod in self.pods if pod.pool == pool and pod.cluster == cluster and pod.ready)

    def count(self, pool: str, cluster: str) -> int:
        """Pods of ``pool`` in ``cluster``, in whatever state; they may hold accelerators."""
        return sum(1 for pod in self.pods if pod.pool == pool and pod.cluster == cluster and not pod.ended)

    def gpus(self, *, outside: str | None = None) -> int:
        """Accelerators held by pods, of all clusters or of those other than ``outside``."""
        return sum(pod.gpus for pod in self.pods if outside is None or pod.cluster != outside)


def view_service(value: Object) -> RayServiceView:
    """Read a RayService."""
    status, spec = value.get("status", {}), value.get("spec", {})
    annotations = value["metadata"].get("annotations", {})
    conditions = {c["type"]: c for c in status.get("conditions", ())}
    active, pending = status.get("activeServiceStatus", {}), status.get("pendingServiceStatus", {})
    unhealthy, running, resizing = _applications(active.get("applicationStatuses", {}))
    ready = conditions.get("Ready", {})
    current = status.get("observedGeneration") == value["metadata"]["generation"]
    config = _applications_in(spec.get("serveConfigV2", ""))
    begun = _true(conditions.get("Suspending")) or _true(conditions.get("Suspended"))
    return RayServiceView(
        revision=annotations.get(ANNOTATION_REVISION, ""),
        cluster_revision=annotations.get(ANNOTATION_CLUSTER_REVISION, ""),
        suspend=bool(spec.get("suspend", False)),
        suspended=_true(conditions.get("Suspended")),
        suspend_ignored=bool(spec.get("suspend", False)) and current and not begun,
        current=current,
        ready=_true(ready),
        upgrading=_true(conditions.get("UpgradeInProgress")),
        active=active.get("rayClusterName", ""),
        pending=pending.get("rayClusterName", ""),
        sizes=_sizes(config),
        told_revision=_told_revision(config),
        running=running,
        resizing=resizing,
        unhealthy=unhealthy,
        problem=ready.get("message", "") if ready.get("reason") == "ValidationFailed" else "",
    )


def _true(condition: Mapping[str, Any] | None) -> bool:
    return condition is not None and condition.get("status") == "True"


def _applications(applications: Mapping[str, Any]) -> tuple[tuple[str, ...], bool, bool]:
    """What is not well, for people; whether all runs; whether all serves, though Serve may be at work on another size of it."""
    unhealthy: list[str] = []
    running = serves = bool(applications)
    for name, application in sorted(applications.items()):
        running = running and application.get("status") == "RUNNING"
        serves = serves and application.get("status") in ("RUNNING", "DEPLOYING")
        if application.get("status") in _BAD_APPLICATION:
            unhealthy.append(f"application {name} is {application['status']}{_said(application)}")
        deployments = application.get("serveDeploymentStatuses", {})
        serves = serves and bool(deployments)
        for deployment, state in sorted(deployments.items()):
            serves = serves and state.get("status") in _GOOD_DEPLOYMENT
            if state.get("status") in _BAD_DEPLOYMENT:
                unhealthy.append(f"deployment {deployment} is {state['status']}{_said(state)}")
    return tuple(unhealthy), running and serves, serves


def _said(state: Mapping[str, Any]) -> str:
    """Serve's message in one line, the cause first: it puts a whole traceback there, whose last line tells what went wrong."""
    lines = [line.strip() for line in str(state.get("message") or "").splitlines() if line.strip()]
    if len(lines) > 1 and lines[-1] not in lines[0]:
        return f": {lines[-1][:_SAID]} ({lines[0].removesuffix('Error:').strip()[:_SAID]})"
    return f": {lines[0][:_SAID]}" if lines else ""


def asked_sizes(config: str) -> dict[str, int]:
    """Workers per pool and gateway in a serveConfigV2; empty when it is none of ours."""
    return _sizes(_applications_in(config))


def _applications_in(config: str) -> list[Any]:
    try:
        return list((parse_yaml(config) or {}).get("applications", ()))
    except (yaml.YAMLError, AttributeError, TypeError):
        return []


def _sizes(applications: list[Any]) -> dict[str, int]:
    try:
        return {group_of(d["name"]): int(d.get("num_replicas", 0)) for a in applications for d in a.get("deployments", ())}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def _told_revision(applications: list[Any]) -> str:
    """The revision that the document of our application has its parts tell; "" when it names none, or there is none of ours."""
    try:
        (application,) = applications
        return str(application["args"]["document"]["metadata"]["annotations"][REVISION_ANNOTATION])
    except (KeyError, TypeError, ValueError):
        return ""


def view_cluster(value: Object) -> ClusterView:
    """Read a RayCluster."""
    groups = value.get("spec", {}).get("workerGroupSpecs", ())
    return ClusterView(
        name=value["metadata"]["name"],
        cluster_revision=value["metadata"].get("annotations", {}).get(ANNOTATION_CLUSTER_REVISION, ""),
        resource_version=value["metadata"]["resourceVersion"],
        bounds={group["groupName"]: (index, int(group.get("maxReplicas", 0))) for index, group in enumerate(groups)},
    )


def view_pods(values: Iterable[Object], gpu_resources: frozenset[str]) -> tuple[PodView, ...]:
    """Read the pods that have not ended well; ``gpu_resources`` names what counts as an accelerator."""
    return tuple(_pod(v, gpu_resources) for v in values if v.get("status", {}).get("phase") != "Succeeded")


def _pod(value: Object, gpu_resources: frozenset[str]) -> PodView:
    labels, status, spec = value["metadata"].get("labels", {}), value.get("status", {}), value.get("spec", {})
    conditions = {c["type"]: c for c in status.get("conditions", ())}
    scheduled = conditions.get("PodScheduled", {})
    containers = status.get("containerStatuses", ())
    waiting = [c.get("state", {}).get("waiting", {}) for c in containers]
    crash = next((f"{w['reason']}: {w.get('message', '')}" for w in waiting if w.get("reason") in _CRASHES), "")
    crash = crash or next((_ending(c["state"]["terminated"]) for c in containers if "terminated" in c.get("state", {})), "")
    ended = status.get("phase") == "Failed"
    running = all("running" in c.get("state", {}) for c in containers)
    return PodView(
        name=value["metadata"]["name"],
        pool=labels.get(LABEL_POOL, ""),
        cluster=labels.get(RAY_CLUSTER_LABEL, ""),
        # The condition alone lags behind: a kubelet that is gone, or late, leaves it true.
        ready=_true(conditions.get("Ready")) and running and not ended and "deletionTimestamp" not in value["metadata"],
        scheduled=_true(scheduled) or bool(spec.get("nodeName")),
        started=bool(containers) and running,
        terminating="deletionTimestamp" in value["metadata"],
        gpus=0 if ended else sum(_gpus(c, gpu_resources) for c in spec.get("containers", ())),
        unschedulable=scheduled.get("message", "") if scheduled.get("reason") == "Unschedulable" else "",
        crash=crash or (f"{status.get('reason', 'Failed')}: {status.get('message', 'the pod has ended')}" if ended else ""),
        address=str(status.get("podIP", "")),
        ended=ended,
    )


def _ending(terminated: Mapping[str, Any]) -> str:
    """How a container ended, for people: "OOMKilled, exit code 137"."""
    said = f": {terminated['message']}" if terminated.get("message") else ""
    return f"{terminated.get('reason', 'Error')}, exit code {terminated.get('exitCode')}{said}"


def _gpus(container: Mapping[str, Any], resources: frozenset[str]) -> int:
    limits = container.get("resources", {}).get("limits", {})
    return sum(int(limits[name]) for name in resources & limits.keys())
