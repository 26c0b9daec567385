"""Pools, workers, leases and load as one value, for ``antiphon status`` (control speed). Must not know: the doors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from antiphon.core.directory import WorkerRecord
from antiphon.core.ids import Role, WorkerId
from antiphon.core.worker_info import WorkerInfo
from antiphon.gateway.compositions import CompositionStatus
from antiphon.gateway.metrics.instruments import kv_usage


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """One pool's sums."""

    deployment: str
    name: str
    role: Role
    num_workers: int
    num_ready: int
    num_waiting: int
    num_running: int
    kv_usage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker: its record, its lease, and this gateway's session with it."""

    info: WorkerInfo
    lease_remaining_s: float
    connected: bool | None  # None = a role that takes no requests
    num_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What a gateway sees."""

    version: str
    uptime_s: float
    num_requests: int
    draining: bool
    pools: tuple[PoolStatus, ...]
    workers: tuple[WorkerStatus, ...]
    compositions: tuple[CompositionStatus, ...] = ()


def pools_of(infos: Sequence[WorkerInfo]) -> tuple[PoolStatus, ...]:
    """The pools that the workers make, in order of deployment and name."""
    keys = sorted({(info.deployment, info.pool, info.role.value) for info in infos})
    pools = []
    for deployment, name, role in keys:
        members = [info for info in infos if (info.deployment, info.pool, info.role.value) == (deployment, name, role)]
        pools.append(
            PoolStatus(
                deployment=deployment,
                name=name,
                role=Role(role),
                num_workers=len(members),
                num_ready=sum(info.ready and not info.draining for info in members),
                num_waiting=sum(info.load.num_waiting for info in members),
                num_running=sum(info.load.num_running for info in members),
                kv_usage=sum(kv_usage(info) for info in members) / len(members),
            )
        )
    return tuple(pools)


def revisions_of(infos: Sequence[WorkerInfo]) -> dict[str, dict[str, int]]:
    """How many workers of each pool take work, by the revision of the document that they run."""
    pools: dict[str, dict[str, int]] = {}
    for info in infos:
        if info.ready and not info.draining:
            counts = pools.setdefault(info.pool, {})
            counts[info.document_revision] = counts.get(info.document_revision, 0) + 1
    return pools


def workers_of(
    records: Sequence[WorkerRecord],
    *,
    age_s: float,
    is_connected: Callable[[WorkerId], bool],
    inflight_on: Callable[[WorkerId], int],
) -> tuple[WorkerStatus, ...]:
    """Workers in order of id; ``age_s`` = seconds since the directory gave the records."""
    return tuple(
        WorkerStatus(
            info=record.info,
            lease_remaining_s=max(0.0, record.remaining_s - age_s),
            connected=is_connected(record.info.worker_id) if record.info.role.generates else None,
            num_requests=inflight_on(record.info.worker_id),
        )
        for record in sorted(records, key=lambda record: record.info.worker_id)
    )
