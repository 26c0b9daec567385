"""From what is seen of the pools to the sizes to ask for and their statuses (control speed, pure).

Must not know: Kubernetes calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from antiphon.core.document.policies import ScalingMode
from antiphon.core.document.pools import PoolSpec
from antiphon.core.document.spec import LLMDeployment
from antiphon_operator.api.conditions import ConditionSet, Reason, Type, seconds, timestamp
from antiphon_operator.api.status import PoolStatus, ServingPoolStatus
from antiphon_operator.kube.base import Object
from antiphon_operator.planning.autoscaler import Metrics, PoolMemory, PoolView, Wish, wish
from antiphon_operator.planning.sizing import Limit, Sizes, bounds_of, constraints_of, next_sizes, plan_sizes
from antiphon_operator.reconcile.observe import Observed
from antiphon_operator.render.children import pool_selector
from antiphon_operator.render.names import GATEWAY

_REASONS = {
    Limit.GPU_BUDGET: (Reason.GPU_BUDGET, "the accelerator budget allows no more"),
    Limit.RATIO: (Reason.RATIO, "the ratios between pools, or expert coverage, ask for another size"),
    Limit.MIN_MAX: (Reason.MIN_MAX, "minReplicas and maxReplicas bound it"),
    Limit.INSUFFICIENT_CAPACITY: (Reason.INSUFFICIENT_CAPACITY, "the cluster has had no room for more"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolsPlan:
    """What was decided about all pools."""

    wishes: Mapping[str, Wish]
    sizes: Sizes  # where it goes
    asked: Mapping[str, int]  # what is asked for now, the gateway included

    @property
    def stale(self) -> list[str]:
        """Pools whose metrics are stale."""
        return [name for name, wished in self.wishes.items() if wished.stale]


def memory_of(child: Object | None) -> PoolMemory:
    """What the ServingPool's status remembers."""
    status: Mapping[str, Any] = {} if child is None else child.get("status", {})
    return PoolMemory(
        accepted=status.get("acceptedReplicas"),
        low_since_s=seconds(status.get("lowSince")),
        pending_since_s=seconds(status.get("pendingSince")),
        capacity_cap=status.get("capacityCap"),
        capacity_retry_at_s=seconds(status.get("capacityRetryAt")),
    )


def plan_pools(
    document: LLMDeployment,
    children: Mapping[str, Object],
    observed: Observed,
    metrics: Mapping[str, Metrics],
    *,
    cluster: str,
    now_s: float,
) -> PoolsPlan:
    """Decide the sizes of all pools. ``cluster`` is the RayCluster that they live in; others count against the budget."""
    spec = document.spec
    wishes: dict[str, Wish] = {}
    for pool in spec.pools:
        child = children.get(pool.name)
        pods = [pod for pod in observed.pods if pod.pool == pool.name and pod.cluster == cluster]
        view = PoolView(
            asked=None if child is None else child["spec"].get("replicas"),
            ready=sum(1 for pod in pods if pod.ready),
            pending=sum(1 for pod in pods if pod.unschedulable),
            metrics=metrics.get(pool.name),
        )
        wishes[pool.name] = wish(pool, spec.slo, view, memory_of(child), now_s)
    bounds, constraints = bounds_of(spec), constraints_of(spec)
    budget = None if spec.gpu_budget is None else max(0, spec.gpu_budget - observed.gpus(outside=cluster))
    sizes = plan_sizes(bounds, {name: wished.replicas for name, wished in wishes.items()}, constraints, budget)
    limited = dict(sizes.limited)
    for name, wished in wishes.items():
        if wished.capped:
            limited[name] = Limit.INSUFFICIENT_CAPACITY
    sizes = replace(sizes, limited=limited)
    asked_before = {} if observed.service is None else observed.service.sizes
    running = {pool.name: max(observed.count(pool.name, cluster), asked_before.get(pool.name, 0)) for pool in spec.pools}
    asked = next_sizes(bounds, running, sizes.replicas, constraints, budget)
    return PoolsPlan(wishes=wishes, sizes=sizes, asked={**asked, GATEWAY: spec.endpoint.replicas})


def pool_statuses(document: LLMDeployment, plan: PoolsPlan, observed: Observed, cluster: str) -> tuple[PoolStatus, ...]:
    """The pools as the LLMDeployment's status shows them."""
    out = []
    for pool in document.spec.pools:
        waiting = [pod for pod in observed.pods if pod.pool == pool.name and pod.unschedulable]
        crashed = [pod for pod in observed.pods if pod.pool == pool.name and pod.crash]
        message = f"{waiting[0].name}: {waiting[0].unschedulable}" if waiting else ""
        message = f"{crashed[0].name}: {crashed[0].crash}" if crashed else message
        out.append(
            PoolStatus(
                name=pool.name,
                role=pool.role,
                desired=plan.wishes[pool.name].desired,
                target=plan.sizes.replicas[pool.name],
                ready=observed.ready(pool.name, cluster),
                pending=len(waiting),
                message=message[:1000],
            )
        )
    return tuple(out)


def serving_pool_status(
    document: LLMDeployment, pool: PoolSpec, child: Object, plan: PoolsPlan, observed: Observed, cluster: str, now_s: float
) -> ServingPoolStatus:
    """The status of one ServingPool."""
    wished = plan.wishes[pool.name]
    generation = child["metadata"]["generation"]
    conditions = ConditionSet(child.get("status", {}).get("conditions", ()), generation=generation, now_s=now_s)
    limit = plan.sizes.limited.get(pool.name)
    accepted = plan.sizes.replicas[pool.name]
    low_since_s = wished.memory.low_since_s
    if limit is None and low_since_s is not None and wished.desired < accepted:
        follows = timestamp(low_since_s + pool.scaling.scale_down_window_s)
        why = f"{wished.desired} wanted, {accepted} kept until {follows}: less must be wanted for scaleDownWindowS"
        conditions.set(Type.SCALING_LIMITED, True, Reason.SCALE_DOWN_WINDOW, f"{why} ({pool.scaling.scale_down_window_s:g} s)")
    elif limit is None:
        conditions.set(Type.SCALING_LIMITED, False, Reason.NOT_LIMITED)
    else:
        reason, why = _REASONS[limit]
        conditions.set(Type.SCALING_LIMITED, True, reason, f"{wished.desired} wanted, {accepted} accepted: {why}")
    if pool.scaling.mode is ScalingMode.SLO:
        fresh = not wished.stale
        conditions.set(
            Type.SCALING_READY,
            fresh,
            Reason.METRICS_FRESH if fresh else Reason.METRICS_STALE,
            "" if fresh else "no recent metrics: the size is held",
        )
    memory = wished.memory
    return ServingPoolStatus(
        observed_generation=generation,
        replicas=observed.count(pool.name, cluster),
        ready_replicas=observed.ready(pool.name, cluster),
        desired_replicas=wished.desired,
        accepted_replicas=plan.sizes.replicas[pool.name],
        selector=pool_selector(document, pool),
        low_since=_time(memory.low_since_s),
        pending_since=_time(memory.pending_since_s),
        capacity_cap=memory.capacity_cap,
        capacity_retry_at=_time(memory.capacity_retry_at_s),
        conditions=conditions.values,
    )


def _time(value_s: float | None) -> str | None:
    return None if value_s is None else timestamp(value_s)
