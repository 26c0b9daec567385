"""What a gateway knows of its pools and workers, as an application sees it (values).

Must not know: messages on the wire, or how any of it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass

from antiphon.core.worker_info import WorkerLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayStatus:
    """The gateway that answered."""

    version: str
    uptime_s: float
    num_requests: int
    draining: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """One pool, its workers summed up."""

    deployment: str
    name: str
    role: str
    num_workers: int
    num_ready: int
    num_waiting: int
    num_running: int
    kv_usage: float  # used share of the KV blocks, 0 to 1; 0 where the role has none


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker."""

    worker_id: str
    deployment: str
    pool: str
    role: str
    model: str
    revision: str
    fingerprint: str
    epoch: int
    rpc_address: str
    data_address: str
    pid: int
    host: str
    shard: str  # "0/2" for FFN workers, else empty
    ready: bool
    draining: bool
    message: str  # why it is not ready
    lease_remaining_s: float | None  # None = the directory does not say
    connected: bool | None  # the gateway's session with it is open; None = the role takes no requests
    num_requests: int  # this gateway's requests on it
    load: WorkerLoad

    @property
    def kv_usage(self) -> float | None:
        """Used share of its KV blocks, 0 to 1; None where the role has none."""
        total = self.load.num_total_blocks
        return None if total == 0 else 1.0 - self.load.num_free_blocks / total


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertStanding:
    """One expert of a composition."""

    name: str
    external: bool
    general: bool
    healthy: bool
    resident: bool
    num_waiting: int
    expected_wait_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CompositionStatus:
    """A composition of experts as the gateway sees it."""

    name: str  # coe/<name>
    state: str  # ready, degraded, unavailable
    message: str
    experts: tuple[ExpertStanding, ...]
    num_fallbacks: int
    last_fallback: str  # "" = none so far


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStatus:
    """The gateway, its pools and their workers, its compositions."""

    gateway: GatewayStatus
    pools: tuple[PoolStatus, ...]
    workers: tuple[WorkerStatus, ...]
    compositions: tuple[CompositionStatus, ...] = ()
