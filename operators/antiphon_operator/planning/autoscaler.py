"""What size a pool wants: from its document, from /scale, or from measured latencies, queues and KV usage (control speed, pure).

    wish = by mode -> held where metrics are stale -> up at once, down after a window -> not above what the cluster had room for

What must survive a restart (since when less is wanted, since when pods wait) is a value that goes in and comes out; it is kept
in the ServingPool's status. Must not know: other pools; ``sizing`` fits the wishes together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from antiphon.core.document.policies import ScalingMode, ScalingSpec, SloSpec
from antiphon.core.document.pools import PoolRole, PoolSpec

TOLERANCE = 0.1  # a measure within this share of its target changes nothing
_TTFT_ROLES: tuple[PoolRole, ...] = ("prefill", "monolith")
_TPOT_ROLES: tuple[PoolRole, ...] = ("decode", "attention", "monolith", "ffn")
_LOAD_ROLES: tuple[PoolRole, ...] = ("prefill", "decode", "attention", "monolith")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """What was measured for one pool; None = not known."""

    measured_at_s: float
    ttft_p95_ms: float | None = None
    tpot_p95_ms: float | None = None
    num_waiting: float | None = None  # over all workers of the pool
    kv_usage: float | None = None  # mean over its workers, 0 to 1
    num_busy: float | None = None  # requests of the whole deployment: held for a pool to wake, waiting, running


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolMemory:
    """What is remembered about a pool between reconciles. Times are in seconds since the epoch."""

    accepted: int | None = None  # size aimed at last
    low_since_s: float | None = None
    pending_since_s: float | None = None
    capacity_cap: int | None = None
    capacity_retry_at_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolView:
    """What is seen of a pool now."""

    asked: int | None = None  # spec.replicas of its ServingPool
    ready: int = 0
    pending: int = 0  # unschedulable pods
    metrics: Metrics | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """The size a pool wants, and what to remember."""

    desired: int  # before waiting and caps; for people
    replicas: int
    memory: PoolMemory
    stale: bool = False
    capped: bool = False


def wish(pool: PoolSpec, slo: SloSpec, view: PoolView, memory: PoolMemory, now_s: float) -> Wish:
    """The size that ``pool`` wants at ``now_s``."""
    current = memory.accepted if memory.accepted is not None else pool.replicas
    stale = False
    match pool.scaling.mode:
        case ScalingMode.STATIC:
            desired = pool.replicas
        case ScalingMode.EXTERNAL:
            desired = view.asked if view.asked is not None else current
        case ScalingMode.SLO:
            fresh = view.metrics is not None and now_s - view.metrics.measured_at_s <= pool.scaling.metrics_max_age_s
            stale = not fresh
            desired = current if view.metrics is None or not fresh else _by_slo(pool, slo, view.metrics, current)
    bounded = min(max(desired, pool.floor), pool.ceiling)
    size, low_since_s = _stabilise(pool.scaling, bounded, current, memory.low_since_s, now_s)
    memory = PoolMemory(
        accepted=memory.accepted,
        low_since_s=low_since_s,
        pending_since_s=_pending_since(view, memory, now_s),
        capacity_cap=memory.capacity_cap,
        capacity_retry_at_s=memory.capacity_retry_at_s,
    )
    size, memory, capped = _cap_by_capacity(pool, view, memory, size, now_s)
    return Wish(desired=desired, replicas=size, memory=memory, stale=stale, capped=capped)


def _by_slo(pool: PoolSpec, slo: SloSpec, metrics: Metrics, current: int) -> int:
    """By its targets; a pool that may sleep does when nothing is asked of the deployment, and never while something is."""
    if metrics.num_busy is not None and pool.floor == 0:
        step = pool.parallelism.num_shards
        return max(step, _by_pressure(pool, slo, metrics, current)) if metrics.num_busy > 0 else 0
    return _by_pressure(pool, slo, metrics, current)


def _by_pressure(pool: PoolSpec, slo: SloSpec, metrics: Metrics, current: int) -> int:
    pressures = []
    if pool.role in _TTFT_ROLES and slo.ttft_ms is not None and metrics.ttft_p95_ms is not None:
        pressures.append(metrics.ttft_p95_ms / slo.ttft_ms)
    if pool.role in _TPOT_ROLES and slo.tpot_ms is not None and metrics.tpot_p95_ms is not None:
        pressures.append(metrics.tpot_p95_ms / slo.tpot_ms)
    scaling = pool.scaling
    if pool.role in _LOAD_ROLES:
        if scaling.target_queue_per_worker is not None and metrics.num_waiting is not None:
            pressures.append(metrics.num_waiting / max(1, current) / scaling.target_queue_per_worker)
        if scaling.target_kv_usage is not None and metrics.kv_usage is not None:
            pressures.append(metrics.kv_usage / scaling.target_kv_usage)
    if not pressures:
        return current
    worst = max(pressures)
    if abs(worst - 1.0) <= TOLERANCE:
        return current
    if current == 0:
        return 1 if worst > 0 else 0
    return max(0, math.ceil(current * worst - 1e-9))


def _stabilise(scaling: ScalingSpec, size: int, current: int, low_since_s: float | None, now_s: float) -> tuple[int, float | None]:
    """Up at once; down only when less has been wanted for the whole window."""
    if scaling.mode is ScalingMode.STATIC or size >= current:
        return size, None
    since_s = low_since_s if low_since_s is not None else now_s
    return (size, None) if now_s - since_s >= scaling.scale_down_window_s else (current, since_s)


def _pending_since(view: PoolView, memory: PoolMemory, now_s: float) -> float | None:
    if view.pending == 0:
        return None
    return memory.pending_since_s if memory.pending_since_s is not None else now_s


def _cap_by_capacity(pool: PoolSpec, view: PoolView, memory: PoolMemory, size: int, now_s: float) -> tuple[int, PoolMemory, bool]:
    """Pods unschedulable past the deadline lower the target to what runs; more is tried again after as long."""
    deadline_s = pool.scaling.pending_deadline_s
    cap, retry_at_s = memory.capacity_cap, memory.capacity_retry_at_s
    if memory.pending_since_s is not None and now_s - memory.pending_since_s >= deadline_s:
        step = pool.parallelism.num_shards
        cap, retry_at_s = max(view.ready // step * step, min(step, size)), now_s + deadline_s
    elif retry_at_s is not None and now_s >= retry_at_s:
        cap, retry_at_s = None, None
    if pool.scaling.mode is ScalingMode.STATIC:
        cap, retry_at_s = None, None  # a person asked for exactly this; it stays pending and the condition says so
    capped = cap is not None and size > cap
    remembered = PoolMemory(
        accepted=memory.accepted,
        low_since_s=memory.low_since_s,
        pending_since_s=memory.pending_since_s,
        capacity_cap=cap,
        capacity_retry_at_s=retry_at_s,
    )
    return (min(size, cap) if cap is not None else size), remembered, capped
