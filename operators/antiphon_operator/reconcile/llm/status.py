"""The status of an LLMDeployment from what was seen and decided (control speed, pure).

Ready is ours: KubeRay's, and every application and deployment well, and as many workers as each pool needs. While a new cluster
comes in, the old one's applications may read empty; that is no outage. Must not know: Kubernetes calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from antiphon.core.document.spec import LLMDeployment
from antiphon_operator.api.conditions import ConditionSet, Reason, Type, seconds
from antiphon_operator.api.status import LLMDeploymentStatus, PoolStatus, RolloutStatus
from antiphon_operator.kube.base import Object
from antiphon_operator.planning.rollout import Action, Step
from antiphon_operator.reconcile.llm.gateway_api import GatewayObjects
from antiphon_operator.reconcile.llm.pools import PoolsPlan, pool_statuses
from antiphon_operator.reconcile.llm.stages import stages
from antiphon_operator.reconcile.observe import Observed
from antiphon_operator.reconcile.writer import Unapplied
from antiphon_operator.render.canonical import fingerprint
from antiphon_operator.render.names import GATEWAY, grpc_port, grpc_service, http_port, http_scheme, http_service

_SUSPEND_IGNORED = (
    "KubeRay has read spec.suspend of the RayService and does not act on it, the pods run on: its operator is older than its "
    "CustomResourceDefinitions; upgrade it to 1.7 or newer"
)
_ROLE_SHORT = {"attention": "attn"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """Where the weights stand."""

    ready: bool
    reason: Reason
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why nothing is done for a document."""

    reason: Reason
    message: str


def serving(document: LLMDeployment, plan: PoolsPlan, observed: Observed) -> bool:
    """True when the active cluster answers requests."""
    service = observed.service
    if service is None or service.suspend or not service.active:
        return False
    applications_well = service.running or service.resizing or (service.upgrading and not service.unhealthy)
    return service.ready and applications_well and enough_pods(document, plan, observed, service.active)


def enough_pods(document: LLMDeployment, plan: PoolsPlan, observed: Observed, cluster: str) -> bool:
    """True when every pool, and the gateway, has as many ready pods as it needs; of a pool that is not to sleep, one whole copy."""
    least_awake = {pool.name: max(pool.floor, pool.parallelism.num_shards) for pool in document.spec.pools}
    needed = {name: min(least, plan.sizes.replicas[name]) for name, least in least_awake.items()} | {GATEWAY: 1}
    return all(observed.ready(pool, cluster) >= least for pool, least in needed.items())


def complete(document: LLMDeployment, plan: PoolsPlan, observed: Observed) -> bool:
    """True when the applied revision is what serves, in all parts."""
    service = observed.service
    if service is None or not serving(document, plan, observed):
        return False
    stands = service.current and service.running and not service.upgrading and not service.pending
    return _of_the_service(observed) and stands and not observed.unproven


def resizing(document: LLMDeployment, plan: PoolsPlan, observed: Observed, last_good: str) -> bool:
    """True while the revision that was complete before serves on, and nothing but its sizes changes: that is no new revision."""
    service = observed.service
    if service is None or not last_good or service.revision != last_good or not serving(document, plan, observed):
        return False
    return _of_the_service(observed) and not service.upgrading and not service.pending and not observed.unproven


def _of_the_service(observed: Observed) -> bool:
    """True when the active cluster is of the revision that its service has."""
    service = observed.service
    active = None if service is None else next((c for c in observed.clusters if c.name == service.active), None)
    return service is not None and active is not None and active.cluster_revision == service.cluster_revision


def llm_status(
    live: Object,
    document: LLMDeployment,
    plan: PoolsPlan,
    observed: Observed,
    step: Step,
    model: ModelState,
    *,
    rollout: RolloutStatus | None,
    failed: str,
    last_good: str,
    unapplied: tuple[Unapplied, ...],
    reached: GatewayObjects,
    now_s: float,
) -> tuple[LLMDeploymentStatus, ConditionSet]:
    """The new status, and its conditions with what changed."""
    previous: Mapping[str, Any] = live.get("status", {})
    generation = live["metadata"]["generation"]
    conditions = ConditionSet(previous.get("conditions", ()), generation=generation, now_s=now_s)
    conditions.set(Type.ACCEPTED, True, Reason.ACCEPTED)
    conditions.set(Type.MODEL_READY, model.ready, model.reason, model.message)
    service = observed.service
    active = "" if service is None else service.active
    cluster = active or ("" if service is None else service.pending)
    pools = pool_statuses(document, plan, observed, cluster)
    is_serving, is_complete = serving(document, plan, observed), complete(document, plan, observed)
    is_resizing = not is_complete and step.revision.name == last_good and resizing(document, plan, observed, last_good)
    zero = all(pool.target == 0 for pool in pools)
    _pools_condition(conditions, plan, observed, pools_ready=all(p.ready >= p.target for p in pools))
    gateways = observed.ready(GATEWAY, active)
    router = (Reason.READY, f"{gateways} gateway pods") if gateways else (Reason.INITIALIZING, "no gateway pod is ready")
    conditions.set(Type.ROUTER_READY, gateways > 0, *router)
    if plan.stale:
        conditions.set(
            Type.SCALING_READY, False, Reason.METRICS_STALE, f"sizes are held for want of metrics: {', '.join(plan.stale)}"
        )
    else:
        conditions.set(Type.SCALING_READY, True, Reason.METRICS_FRESH)
    _available_condition(conditions, document, observed, previous, zero=zero and is_serving)
    _ready_condition(
        conditions, document, observed, step, failed=failed, unapplied=unapplied,
        is_serving=is_serving, is_complete=is_complete, is_resizing=is_resizing, zero=zero,
    )  # fmt: skip
    _progress_conditions(conditions, document, step, failed=failed, is_complete=is_complete, is_resizing=is_resizing)
    if service is not None and service.suspend_ignored:
        conditions.set(Type.PROGRESSING, False, Reason.UNSUPPORTED_KUBERAY, _SUSPEND_IGNORED)
        conditions.set(Type.RECONCILING, False, Reason.UNSUPPORTED_KUBERAY)
        conditions.set(Type.STALLED, True, Reason.UNSUPPORTED_KUBERAY, _SUSPEND_IGNORED)
    unhealthy = () if service is None else service.unhealthy
    short = [pool for pool in pools if pool.ready < pool.target]
    if unapplied:
        conditions.set(Type.DEGRADED, True, unapplied[0].reason, _told(unapplied))
    elif conditions.holds(Type.AVAILABLE) and (unhealthy or _workers_lost(previous, pools) or (short and _in_trouble(conditions))):
        missing = f"fewer workers than wanted: {', '.join(f'{p.name} {p.ready}/{p.target}' for p in short)}"
        conditions.set(Type.DEGRADED, True, Reason.DEPLOYMENT_UNHEALTHY, "; ".join(unhealthy) or missing)
    else:
        conditions.set(Type.DEGRADED, False, Reason.HEALTHY)
    status = LLMDeploymentStatus(
        observed_generation=generation,
        conditions=conditions.values,
        pools=pools,
        summary=", ".join(f"{_ROLE_SHORT.get(p.name, p.name)} {p.ready}/{p.target}" for p in pools),
        **_known(live, document),
        revision="" if service is None else service.revision,
        cluster_revision="" if service is None else service.cluster_revision,
        serve_revision=fingerprint(sorted(plan.asked.items())) if service is None else _serve_revision(observed, plan),
        last_good_revision=service.revision if is_complete and service is not None else last_good,
        failed_revision=failed,
        rollout=rollout,
        stages=stages(previous, observed, rollout, cluster, is_complete=is_complete, now_s=now_s),
        active_cluster=active,
        route=reached.route,
        inference_pool=reached.pool,
    )
    return status, conditions


def _known(live: Object, document: LLMDeployment) -> dict[str, str]:
    """What the document alone says of the status: who is asked, and where."""
    namespace, name = live["metadata"].get("namespace", "default"), document.metadata.name
    return {
        "model": document.model_name,
        "url": f"{http_scheme(document)}://{http_service(name)}.{namespace}.svc:{http_port(document)}/v1",
        "grpcUrl": f"{grpc_service(name)}.{namespace}.svc:{grpc_port(document)}",
    }


def refused_status(
    live: Object,
    refusal: Refusal,
    model: ModelState | None = None,
    *,
    document: LLMDeployment | None = None,
    now_s: float,
) -> tuple[Mapping[str, Any], ConditionSet]:
    """The previous status with the refusal in it; what runs is left alone and its figures stand. Weights come all the same.

    ``document``: the one that is refused, as far as it could be read.
    """
    previous: Mapping[str, Any] = live.get("status", {})
    generation = live["metadata"]["generation"]
    conditions = ConditionSet(previous.get("conditions", ()), generation=generation, now_s=now_s)
    conditions.set(Type.ACCEPTED, False, refusal.reason, refusal.message)
    if model is not None:
        conditions.set(Type.MODEL_READY, model.ready, model.reason, model.message)
    kept_on = f"; revision {previous['revision']} is left as it is" if previous.get("activeCluster") else ""
    conditions.set(Type.READY, False, refusal.reason, f"{refusal.message}{kept_on}")
    conditions.set(Type.STALLED, True, refusal.reason, refusal.message)
    kept = {c["type"]: c for c in previous.get("conditions", ())}
    fresh = {c.type: c.model_dump(mode="json", by_alias=True) for c in conditions.values}
    merged = kept | fresh
    known = {} if document is None or previous.get("activeCluster") else _known(live, document)
    status = {**previous, **known, "observedGeneration": generation, "conditions": [merged[t] for t in sorted(merged)]}
    return status, conditions


def waiting_status(
    live: Object, document: LLMDeployment, model: ModelState, *, now_s: float
) -> tuple[Mapping[str, Any], ConditionSet]:
    """The status while the weights are not there and nothing has been started yet."""
    previous: Mapping[str, Any] = live.get("status", {})
    generation = live["metadata"]["generation"]
    conditions = ConditionSet(previous.get("conditions", ()), generation=generation, now_s=now_s)
    failed = model.reason is Reason.DOWNLOAD_FAILED
    conditions.set(Type.ACCEPTED, True, Reason.ACCEPTED)
    conditions.set(Type.MODEL_READY, False, model.reason, model.message)
    conditions.set(Type.READY, False, model.reason if failed else Reason.INITIALIZING, model.message)
    conditions.set(Type.RECONCILING, not failed, model.reason, model.message)
    conditions.set(Type.STALLED, failed, model.reason if failed else Reason.HEALTHY)
    values = [c.model_dump(mode="json", by_alias=True) for c in conditions.values]
    return {**previous, **_known(live, document), "observedGeneration": generation, "conditions": values}, conditions


def progress_marker(observed: Observed) -> str:
    """What has been reached: a fingerprint of the clusters and, in the one being brought in, pods scheduled, started and ready.

    Pods of the cluster that still serves are left out, and so are names: what is lost and made anew has not come further.
    """
    service = observed.service
    seen, home, running = None, "", False
    if service is not None:
        home, running = service.pending or service.active, service.running
        seen = [service.revision, service.current, service.active, service.pending, service.suspended]
    pods = [p for p in observed.pods if p.cluster == home and not p.ended]
    reached = (sum(p.scheduled for p in pods), sum(p.started for p in pods), sum(p.ready for p in pods), int(running))
    return ":".join([fingerprint([seen, [c.name for c in observed.clusters]], 16), *map(str, reached)])


def furthest(before: str, now: str) -> str:
    """Of two markers the one that is further: each count's higher one while the clusters are the same, else ``now``."""
    (clusters, *counts), (clusters_now, *counts_now) = before.split(":"), now.split(":")
    if clusters != clusters_now or len(counts) != len(counts_now):
        return now
    return ":".join([clusters, *(str(max(int(a), int(b))) for a, b in zip(counts, counts_now, strict=True))])


def has_stood(rollout: Mapping[str, Any], observed: Observed, for_s: float, now_s: float) -> bool:
    """Whether nothing of what is seen has come further for ``for_s`` seconds; ``rollout``: that of the last status."""
    marker = rollout.get("marker", "")
    if furthest(marker, progress_marker(observed)) != marker:
        return False
    since = seconds(rollout.get("lastProgressAt"))
    return since is not None and now_s - since >= for_s


def _serve_revision(observed: Observed, plan: PoolsPlan) -> str:
    revision = "" if observed.service is None else observed.service.revision
    return fingerprint([revision, sorted(plan.asked.items())])


def _pools_condition(conditions: ConditionSet, plan: PoolsPlan, observed: Observed, *, pools_ready: bool) -> None:
    staying = [pod for pod in observed.pods if not pod.terminating and not leaving(observed, pod.cluster)]
    crashed = next((pod for pod in staying if pod.crash), None)
    waiting = next((pod for pod in staying if pod.unschedulable), None)
    unhealthy = () if observed.service is None else observed.service.unhealthy
    if crashed is not None:
        conditions.set(Type.POOLS_READY, False, Reason.CRASH_LOOP, f"{crashed.name}: {crashed.crash}")
    elif unhealthy:
        conditions.set(Type.POOLS_READY, False, Reason.DEPLOYMENT_UNHEALTHY, "; ".join(unhealthy))
    elif any(wished.capped for wished in plan.wishes.values()):
        capped = ", ".join(name for name, wished in plan.wishes.items() if wished.capped)
        conditions.set(Type.POOLS_READY, False, Reason.INSUFFICIENT_CAPACITY, f"the cluster has no room for more of {capped}")
    elif waiting is not None:
        conditions.set(Type.POOLS_READY, False, Reason.PODS_PENDING, f"{waiting.name}: {waiting.unschedulable}")
    elif pools_ready:
        conditions.set(Type.POOLS_READY, True, Reason.ALL_READY)
    else:
        conditions.set(Type.POOLS_READY, False, Reason.PODS_PENDING, "workers are starting")


def leaving(observed: Observed, cluster: str) -> bool:
    """Whether ``cluster`` was replaced and goes: how its pods end is no trouble of the deployment's."""
    seen = observed.service
    return seen is not None and bool(seen.active) and cluster not in (seen.active, seen.pending)


def _workers_lost(previous: Mapping[str, Any], pools: tuple[PoolStatus, ...]) -> bool:
    """Whether a pool has fewer workers than it had, or not yet all of them back; one that grows to a new size has lost none."""
    before = {pool["name"]: pool for pool in previous.get("pools", ())}
    was_degraded = any(c["type"] == Type.DEGRADED and c["status"] == "True" for c in previous.get("conditions", ()))
    for pool in pools:
        if pool.name in before and pool.ready < pool.target:
            ready, target = before[pool.name]["ready"], before[pool.name]["target"]
            if pool.ready < ready or (was_degraded and ready < target):
                return True
    return False


def _in_trouble(conditions: ConditionSet) -> bool:
    return conditions.reason(Type.POOLS_READY) in (Reason.CRASH_LOOP, Reason.INSUFFICIENT_CAPACITY, Reason.DEPLOYMENT_UNHEALTHY)


def _trouble(conditions: ConditionSet) -> str:
    return f"; {conditions.message(Type.POOLS_READY)}" if _in_trouble(conditions) else ""


def _told(unapplied: tuple[Unapplied, ...]) -> str:
    return "; ".join(item.message for item in unapplied)


def _available_condition(
    conditions: ConditionSet, document: LLMDeployment, observed: Observed, previous: Mapping[str, Any], *, zero: bool
) -> None:
    """Whether requests are answered, by whatever revision: a whole copy of the weights in every pool, and a gateway.

    A deployment that wakes stays available: its gateway holds requests until the first worker is there.
    """
    service = observed.service
    if zero:
        conditions.set(Type.AVAILABLE, True, Reason.SCALED_TO_ZERO, "the next request starts a worker")
        return
    active = "" if service is None or not service.ready or service.suspend else service.active
    needed = {pool.name: pool.parallelism.num_shards for pool in document.spec.pools if pool.ceiling} | {GATEWAY: 1}
    short = [name for name, least in needed.items() if observed.ready(name, active) < least]
    slept = any(
        c["type"] == Type.AVAILABLE and c["status"] == "True" and c["reason"] == Reason.SCALED_TO_ZERO
        for c in previous.get("conditions", ())
    )
    sleepers = {pool.name for pool in document.spec.pools if pool.floor == 0}
    hopeless = _in_trouble(conditions) or any(pod.unschedulable for pod in observed.pods if not leaving(observed, pod.cluster))
    if not active:
        conditions.set(Type.AVAILABLE, False, Reason.INITIALIZING, "no cluster serves yet")
    elif short and slept and sleepers.issuperset(short) and not hopeless:
        conditions.set(Type.AVAILABLE, True, Reason.SCALED_TO_ZERO, "its workers are being started; requests wait for them")
    elif short:
        conditions.set(Type.AVAILABLE, False, Reason.PODS_PENDING, f"too few workers are ready in {', '.join(short)}")
    else:
        conditions.set(Type.AVAILABLE, True, Reason.READY, "requests are answered")


def _ready_condition(
    conditions: ConditionSet,
    document: LLMDeployment,
    observed: Observed,
    step: Step,
    *,
    failed: str,
    unapplied: tuple[Unapplied, ...],
    is_serving: bool,
    is_complete: bool,
    is_resizing: bool,
    zero: bool,
) -> None:
    """Whether what was asked for is applied and serves; never true while an older revision still answers in its place."""
    service = observed.service
    is_applied = service is not None and service.revision == step.revision.name  # else another waits, as for its weights
    if unapplied:
        conditions.set(Type.READY, False, unapplied[0].reason, f"not applied: {_told(unapplied)}")
    elif failed and step.action is not Action.STALL and step.revision.name != failed and not document.spec.suspend:
        why = f"revision {failed} made no progress and was given up; revision {step.revision.name} is kept"
        conditions.set(Type.READY, False, Reason.ROLLED_BACK, why)
    elif service is not None and service.suspend_ignored:
        conditions.set(Type.READY, False, Reason.UNSUPPORTED_KUBERAY, _SUSPEND_IGNORED)
    elif document.spec.suspend:
        conditions.set(Type.READY, False, Reason.SUSPENDED, "the document asks for it")
    elif is_serving and step.action is Action.STALL:
        conditions.set(Type.READY, False, Reason.PROGRESS_DEADLINE_EXCEEDED, step.why)
    elif is_serving and not ((is_complete or is_resizing) and step.action in (Action.NOTHING, Action.WAIT) and is_applied):
        awaited = (step.action is Action.WAIT and observed.unproven) or step.why
        why = f"revision {step.revision.name} is on its way, requests are answered meanwhile: {awaited}"
        conditions.set(Type.READY, False, Reason.NEW_REVISION, why + _trouble(conditions))
    elif zero and is_serving:
        conditions.set(Type.READY, True, Reason.SCALED_TO_ZERO, "no worker runs; the next request starts one")
    elif is_serving:
        conditions.set(Type.READY, True, Reason.READY, "a pool is on its way to another size" if is_resizing else "")
    elif service is not None and service.unhealthy:
        conditions.set(Type.READY, False, Reason.DEPLOYMENT_UNHEALTHY, "; ".join(service.unhealthy))
    else:
        problem = service.problem if service is not None else ""
        conditions.set(Type.READY, False, Reason.INITIALIZING, problem or step.why + _trouble(conditions))


def _progress_conditions(
    conditions: ConditionSet, document: LLMDeployment, step: Step, *, failed: str, is_complete: bool, is_resizing: bool
) -> None:
    on_its_way = Reason.PODS_PENDING if is_resizing and step.action is Action.WAIT else Reason.NEW_REVISION
    rolled_back = bool(failed) and step.action is not Action.STALL and step.revision.name != failed
    if step.action is Action.STALL:
        conditions.set(Type.PROGRESSING, False, Reason.PROGRESS_DEADLINE_EXCEEDED, step.why)
    elif is_complete and step.action is Action.NOTHING:
        reason = Reason.ROLLED_BACK if rolled_back else Reason.PAUSED if document.spec.rollout.paused else Reason.COMPLETE
        conditions.set(Type.PROGRESSING, False, reason, step.why)
    elif document.spec.suspend and step.action is Action.NOTHING:
        conditions.set(Type.PROGRESSING, False, Reason.SUSPENDED, step.why)
    else:
        conditions.set(Type.PROGRESSING, True, on_its_way, f"{step.action.value}: {step.why}")
    busy, stalled = conditions.holds(Type.PROGRESSING), step.action is Action.STALL
    conditions.set(Type.ROLLBACK_IN_PROGRESS, rolled_back and busy, Reason.PROGRESS_DEADLINE_EXCEEDED if failed else Reason.HEALTHY)
    conditions.set(Type.RECONCILING, busy, on_its_way if busy else Reason.COMPLETE)
    why = (Reason.PROGRESS_DEADLINE_EXCEEDED, step.why) if stalled else (Reason.HEALTHY, "")
    conditions.set(Type.STALLED, stalled, *why)
