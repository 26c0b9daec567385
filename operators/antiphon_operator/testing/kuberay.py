"""A scripted KubeRay with its autoscaler and pods: each ``tick`` moves every RayService one stage on (control speed).

    no cluster -> pending, pods created -> scheduled -> started -> ready, DEPLOYING -> RUNNING, active -> old one deleted

Before all else it adds its finalizer as the real one does: by a PUT of the whole object, in which its Go types write their zero
values into every worker group, whose list it owns from then on as an Update manager. It takes the finalizer off, once the clusters
are gone, by another such PUT.
While a new cluster comes in the active one's applications read empty, as KubeRay's do. It reads Serve's status before it hands a
new configuration to Serve, so that the first status of a new generation still speaks of what ran before; a part takes the new one
with each tick after that, the gateways first. They tell which revision they run, see ``ask``. Must not know: the operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from antiphon.core.document.part import REVISION_ANNOTATION
from antiphon_operator.kube.base import Object, owner_reference
from antiphon_operator.kube.resources import POD, RAY_CLUSTER, RAY_SERVICE
from antiphon_operator.reconcile.gateways import GatewayWord
from antiphon_operator.render.canonical import fingerprint, parse_yaml
from antiphon_operator.render.names import GATEWAY, group_of
from antiphon_operator.testing.json_values import copied
from antiphon_operator.testing.memory_api import MemoryApi

_BOUNDS = ("replicas", "minReplicas", "maxReplicas")
_GPU = "nvidia.com/gpu"
FINALIZER = "ray.io/rayservice-finalizer"
UPDATE_MANAGER = "kuberay-operator"


@dataclass(slots=True)
class KubeRay:
    """Plays KubeRay, Ray's autoscaler, the scheduler and the kubelet over ``api``."""

    api: MemoryApi
    num_gpus: int = 1_000_000  # room in the cluster
    broken_images: set[str] = field(default_factory=set)  # pods of these never start
    unhealthy: dict[str, str] = field(default_factory=dict)  # deployment -> Serve's status for it
    application_status: str | None = None  # says this for every application
    knows_suspend: bool = True  # 1.6 with the definitions of 1.7 reads past it, and writes no such condition
    messages: dict[str, str] = field(default_factory=dict)  # deployment -> what Serve says of it
    silent: bool = False  # gateways can't be reached from the operator
    asleep: bool = False  # does nothing, as when its operator is down
    max_gpus_seen: int = 0
    max_clusters_seen: int = 0
    _serial: int = 0
    _given: dict[str, str] = field(default_factory=dict)  # cluster -> the configuration that Serve has
    _parts: dict[str, dict[str, str]] = field(default_factory=dict)  # cluster -> pool or gateway -> the revision it runs

    async def ask(self, urls: Mapping[str, str]) -> Mapping[str, GatewayWord]:
        """What the gateways of these pods say, see ``GatewaySource``."""
        pods = {pod["metadata"]["name"]: pod for pod in self.api.list(POD, None).items}
        return {name: self._word(pods, pods[name]) for name in urls if name in pods and not self.silent}

    def _word(self, pods: Mapping[str, Object], gateway: Object) -> GatewayWord:
        cluster = gateway["metadata"]["labels"]["ray.io/cluster"]
        parts = self._parts.get(cluster, {})
        ready = [
            pod["metadata"]["labels"]["ray.io/group"]
            for pod in pods.values()
            if pod["metadata"]["labels"].get("ray.io/cluster") == cluster and _is_ready(pod)
        ]
        pools = {pool: {revision: ready.count(pool)} for pool, revision in parts.items() if pool != GATEWAY and pool in ready}
        return GatewayWord(revision=parts.get(GATEWAY, ""), revisions=pools)

    def running(self, cluster: str) -> Mapping[str, str]:
        """The revision that each pool, and the gateway, of a cluster runs."""
        return dict(self._parts.get(cluster, {}))

    def tick(self) -> None:
        """Move everything one stage on."""
        if self.asleep:
            return
        self.api.quiet = True
        try:
            for service in self.api.list(RAY_SERVICE, None).items:
                self._reconcile(service)
            held = sum(_gpus(pod) for pod in self.api.list(POD, None).items)
            self.max_gpus_seen = max(self.max_gpus_seen, held)
            self.max_clusters_seen = max(self.max_clusters_seen, len(self.api.list(RAY_CLUSTER, None).items))
        finally:
            self.api.quiet = False

    def _reconcile(self, service: Object) -> None:
        namespace = service["metadata"]["namespace"]
        status = copied(service.get("status", {}))
        clusters = {
            cluster["metadata"]["name"]: cluster
            for cluster in self.api.list(
                RAY_CLUSTER, namespace, {"ray.io/originated-from-cr-name": service["metadata"]["name"]}
            ).items
        }
        if "deletionTimestamp" in service["metadata"]:
            for name in clusters:
                self._delete_cluster(namespace, name)
            if not clusters:
                self._put(service, finalizers=[])
            return
        if FINALIZER not in service["metadata"].get("finalizers", ()):
            service = self._put(service, finalizers=[FINALIZER])
        if service["spec"].get("suspend") and self.knows_suspend:
            self._suspend(service, status, clusters)
            return
        active = status.get("activeServiceStatus", {}).get("rayClusterName", "")
        pending = status.get("pendingServiceStatus", {}).get("rayClusterName", "")
        wanted = _cluster_hash(service)
        newest = clusters.get(pending or active)
        if newest is None or (_stored_hash(newest) != wanted and self._may_replace(service)):
            if not pending or newest is not None:
                self._serial += 1
                pending = f"{service['metadata']['name']}-{self._serial:05d}"
            clusters[pending] = self._create_cluster(service, pending, wanted)
        for name in clusters:
            if name not in (active, pending):
                self._delete_cluster(namespace, name)
        home = pending or active
        text = service["spec"]["serveConfigV2"]
        handed_over = self._given.get(home, text) != text
        self._given[home] = text
        config = parse_yaml(text)
        sizes = {
            d["name"].removeprefix("pool-"): d.get("num_replicas", 0) for a in config["applications"] for d in a["deployments"]
        }
        started = self._run_cluster(clusters[home], sizes)
        updated = not handed_over and self._update(home, config)
        healthy = started and updated
        applications = self._applications(config, healthy=healthy, moving="UPSCALING" if home == active and updated else "UPDATING")
        if handed_over:  # what was read before
            applications = status.get("activeServiceStatus" if home == active else "pendingServiceStatus", {}).get(
                "applicationStatuses", {}
            )
            healthy = False
        if healthy and pending and all(a["status"] == "RUNNING" for a in applications.values()):
            active, pending = pending, ""
        upgrading = bool(pending) and bool(active)
        seen = {"rayClusterName": active} if active else {}
        waiting = {"rayClusterName": pending, "applicationStatuses": applications} if pending else {}
        if active and not upgrading:
            seen["applicationStatuses"] = applications
        ready = bool(active)
        self._write(
            service,
            status,
            active=seen,
            pending=waiting,
            conditions={
                "Ready": (ready, "NonZeroServeEndpoints" if ready else "Initializing"),
                "UpgradeInProgress": (upgrading, "BothActivePendingClustersExist" if upgrading else "NoPendingCluster"),
                "Suspended": (False, "RayServiceResumed"),
            },
        )

    def _put(self, service: Object, *, finalizers: list[str]) -> Object:
        """Write the whole object as Go's types have it."""
        value = copied(service)
        value["metadata"]["finalizers"] = finalizers
        for group in value["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
            group.setdefault("scaleStrategy", {})
            group.setdefault("priority", 0)
        return self.api.update(RAY_SERVICE, value, manager=UPDATE_MANAGER)

    def _update(self, cluster: str, config: Object) -> bool:
        """Bring the next part to the revision of ``config``; True when all of them run it. A new cluster starts with it."""
        (application,) = config["applications"]
        revision = application["args"]["document"]["metadata"].get("annotations", {}).get(REVISION_ANNOTATION, "")
        names = [group_of(deployment["name"]) for deployment in application["deployments"]]
        parts = self._parts.setdefault(cluster, dict.fromkeys(names, revision))
        old = sorted((name for name in names if parts.get(name) != revision), key=lambda name: name != GATEWAY)
        for name in old[:1]:
            parts[name] = revision
        return len(old) <= 1

    @staticmethod
    def _may_replace(service: Object) -> bool:
        return bool(service["spec"].get("upgradeStrategy", {}).get("type") != "None")

    def _suspend(self, service: Object, status: Object, clusters: Mapping[str, Object]) -> None:
        for name in clusters:
            self._delete_cluster(service["metadata"]["namespace"], name)
        gone = not clusters
        conditions = {
            "Ready": (False, "SuspendComplete"),
            "UpgradeInProgress": (False, "SuspendInProgress"),
            "Suspending": (not gone, "SuspendRequested"),
            "Suspended": (gone, "SuspendComplete"),
        }
        self._write(service, status, active={}, pending={}, conditions=conditions)

    def _create_cluster(self, service: Object, name: str, wanted: str) -> Object:
        metadata = service["metadata"]
        value = {
            "metadata": {
                "name": name,
                "namespace": metadata["namespace"],
                "labels": {**metadata.get("labels", {}), "ray.io/originated-from-cr-name": metadata["name"]},
                "annotations": {**metadata.get("annotations", {}), "ray.io/hash": wanted},
                "ownerReferences": [owner_reference(service)],
            },
            "spec": service["spec"]["rayClusterConfig"],
        }
        return self.api.create(RAY_CLUSTER, value, manager="kuberay")

    def _delete_cluster(self, namespace: str, name: str) -> None:
        self.api.delete(RAY_CLUSTER, namespace, name)

    def _run_cluster(self, cluster: Object, sizes: Mapping[str, int]) -> bool:
        """Make pods follow ``sizes`` and move each one stage on; True when all of them are ready."""
        namespace, name = cluster["metadata"]["namespace"], cluster["metadata"]["name"]
        pods = self.api.list(POD, namespace, {"ray.io/cluster": name}).items
        well = True
        templates = {"headgroup": (cluster["spec"]["headGroupSpec"]["template"], 1)}
        for group in cluster["spec"]["workerGroupSpecs"]:
            wanted = min(sizes.get(group["groupName"], 0), group["maxReplicas"])
            templates[group["groupName"]] = (group["template"], wanted)
        for group_name, (template, wanted) in templates.items():
            present = [pod for pod in pods if pod["metadata"]["labels"]["ray.io/group"] == group_name]
            for pod in present[wanted:]:
                self.api.delete(POD, namespace, pod["metadata"]["name"])
            for _ in range(wanted - len(present)):
                self._create_pod(cluster, group_name, template)
                well = False
            for pod in present[:wanted]:
                well = self._advance(pod) and well
        return well

    def _create_pod(self, cluster: Object, group: str, template: Object) -> None:
        self._serial += 1
        name = f"{cluster['metadata']['name']}-{group}-{self._serial:05d}"
        labels = {**template["metadata"]["labels"], "ray.io/cluster": cluster["metadata"]["name"], "ray.io/group": group}
        metadata = {
            "name": name,
            "namespace": cluster["metadata"]["namespace"],
            "labels": labels,
            "ownerReferences": [owner_reference(cluster)],
        }
        value = {"metadata": metadata, "spec": copied(template["spec"]), "status": {"phase": "Pending"}}
        self.api.create(POD, value, manager="kuberay")

    def _advance(self, pod: Object) -> bool:
        status = pod.get("status", {})
        conditions = {c["type"]: c for c in status.get("conditions", ())}
        container = pod["spec"]["containers"][0]
        if conditions.get("Ready", {}).get("status") == "True":
            return True
        if conditions.get("PodScheduled", {}).get("status") != "True":
            taken = sum(_gpus(p) for p in self.api.list(POD, None).items if _scheduled(p))
            if taken + _gpus(pod) > self.num_gpus:
                message = f"0/3 nodes are available: 3 Insufficient {_GPU}."
                new = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]
                self._pod_status(pod, {"phase": "Pending", "conditions": new})
                return False
            self._pod_status(pod, {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "True"}]})
            return False
        scheduled = {"type": "PodScheduled", "status": "True"}
        if container["image"] in self.broken_images:
            waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off restarting failed container"}}
            state = [{"name": container["name"], "state": waiting, "ready": False}]
            self._pod_status(pod, {"phase": "Running", "conditions": [scheduled], "containerStatuses": state})
            return False
        running = [{"name": container["name"], "state": {"running": {}}, "ready": True}]
        if not status.get("containerStatuses"):
            self._pod_status(pod, {"phase": "Running", "conditions": [scheduled], "containerStatuses": running})
            return False
        ready = [scheduled, {"type": "Ready", "status": "True"}]
        self._pod_status(pod, {"phase": "Running", "conditions": ready, "containerStatuses": running, "podIP": "10.0.0.1"})
        return True

    def _pod_status(self, pod: Object, status: Object) -> None:
        self.api.update(POD, {**pod, "status": status}, manager="kubelet", subresource="status")

    def _applications(self, config: Object, *, healthy: bool, moving: str) -> Object:
        """As Serve tells it; a deployment that serves and gets another size is UPSCALING, its application DEPLOYING."""
        out: Object = {}
        for application in config["applications"]:
            deployments = {
                d["name"]: {
                    "status": self.unhealthy.get(d["name"], "HEALTHY" if healthy else moving),
                    "message": self.messages.get(d["name"], ""),
                }
                for d in application["deployments"]
            }
            bad = [name for name in deployments if name in self.unhealthy]
            status = "UNHEALTHY" if bad else "RUNNING" if healthy else "DEPLOYING"
            status = self.application_status or status
            message = f"The deployments {bad} are UNHEALTHY." if bad else ""
            out[application["name"]] = {"status": status, "message": message, "serveDeploymentStatuses": deployments}
        return out

    def _write(self, service: Object, before: Object, *, active: Object, pending: Object, conditions: Mapping[str, Any]) -> None:
        status: Object = {
            "observedGeneration": service["metadata"]["generation"],
            "activeServiceStatus": active,
            "pendingServiceStatus": pending,
            "conditions": [
                {"type": type_, "status": "True" if holds else "False", "reason": reason, "message": ""}
                for type_, (holds, reason) in sorted(conditions.items())
            ],
        }
        if status != before:
            self.api.update(RAY_SERVICE, {**service, "status": status}, manager="kuberay", subresource="status")


def _cluster_hash(service: Object) -> str:
    config = copied(service["spec"]["rayClusterConfig"])
    for group in config["workerGroupSpecs"]:
        for key in (*_BOUNDS, "scaleStrategy", "priority"):
            group.pop(key, None)
    return fingerprint(config)


def _stored_hash(cluster: Object) -> str:
    return str(cluster["metadata"]["annotations"]["ray.io/hash"])


def _scheduled(pod: Object) -> bool:
    return any(c["type"] == "PodScheduled" and c["status"] == "True" for c in pod.get("status", {}).get("conditions", ()))


def _is_ready(pod: Object) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod.get("status", {}).get("conditions", ()))


def _gpus(pod: Object) -> int:
    return sum(int(c.get("resources", {}).get("limits", {}).get(_GPU, 0)) for c in pod["spec"]["containers"])
