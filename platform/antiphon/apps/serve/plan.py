"""What a document becomes on Ray Serve, as plain values: which deployments, of how many replicas, asking for what (control speed).

Pure: nothing here starts, opens or reads anything. Must not know: Ray, processes, or where the directory runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from antiphon.apps.process.config import LogSettings, WorkerConfig
from antiphon.apps.tiers.plan import TierPool
from antiphon.core.document.pools import PoolSpec, parse_quantity
from antiphon.core.document.spec import LLMDeployment, LLMDeploymentSpec
from antiphon.core.ids import Epoch, FFNShard

GATEWAY = "gateway"  # Serve name of the gateway's deployment; pools are called pool-<name> and can't collide with it
GATEWAY_CPU = 0.1  # what Ray reserves for a gateway replica; its work is mostly waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """How processes of a deployment are run; equal for all of them.

    ``run_dir`` takes logs and configurations of worker processes, ``worker_argv`` is the command of one worker.
    """

    checkpoint: str | None = None  # directory; None = every replica resolves the model's uri itself
    directory: str | None = None  # address; None = the document's Redis, or else the embedded directory actor
    run_dir: str | None = None  # None = a temporary directory per replica
    host: str | None = None  # bound and advertised by workers; None = the address of the replica's node
    worker_argv: tuple[str, ...] = ()  # empty = this Python's antiphon.apps.process.main
    start_timeout_s: float = 600.0  # from process start to ready
    max_start_attempts: int = 20  # of a pool's replicas, before Serve gives the application up
    drain_s: float = 20.0
    log: LogSettings = field(default_factory=LogSettings)
    ray_address: str | None = None  # of a running Ray to join; None = one of this run's own
    ray_dashboard: bool = False  # with its dashboard
    cards: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)  # see apps.devices; empty = Ray deals them out
    fork_server: str | None = None  # its address, on this machine; None = each worker is started from nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPlan:
    """One pool: one Serve deployment, pinned to nodes that offer the custom resource of its name."""

    name: str
    num_replicas: int
    num_cpus: float
    num_gpus: int
    memory_bytes: int | None

    @property
    def deployment_name(self) -> str:
        """Serve's name of the pool, and the name of the custom resource it is pinned by."""
        return f"pool-{self.name}"

    def actor_options(self, *, pinned: bool, sized: bool) -> dict[str, Any]:
        """Ray actor options of one replica.

        Args:
            pinned: ask for the pool's custom resource; the nodes must offer it.
            sized: ask for memory and accelerators, too.
        """
        options: dict[str, Any] = {"num_cpus": self.num_cpus}
        if pinned:
            options["resources"] = {self.deployment_name: 1}
        if sized and self.memory_bytes is not None:
            options["memory"] = self.memory_bytes
        if sized and self.num_gpus:
            options["num_gpus"] = self.num_gpus
        return options


@dataclass(frozen=True, slots=True, kw_only=True)
class ServePlan:
    """One document as one Serve application."""

    application: str
    pools: tuple[PoolPlan, ...]
    num_gateways: int

    @property
    def num_workers(self) -> int:
        """Worker processes of all pools."""
        return sum(pool.num_replicas for pool in self.pools)

    @property
    def num_cpus(self) -> float:
        """Processors that all replicas together reserve in Ray."""
        return sum(pool.num_cpus * pool.num_replicas for pool in self.pools) + GATEWAY_CPU * self.num_gateways

    @property
    def resources(self) -> dict[str, float]:
        """Custom resources that one node must offer to host everything."""
        return {pool.deployment_name: float(pool.num_replicas) for pool in self.pools}


def plan_serve(document: LLMDeployment) -> ServePlan:
    """The Serve application of ``document``; pools without replicas are left out."""
    return ServePlan(
        application=document.metadata.name,
        pools=tuple(_plan_pool(pool) for pool in document.spec.pools if pool.replicas),
        num_gateways=document.spec.endpoint.replicas,
    )


def _plan_pool(pool: PoolSpec) -> PoolPlan:
    memory = pool.resources.memory
    return PoolPlan(
        name=pool.name,
        num_replicas=pool.replicas,
        num_cpus=parse_quantity(pool.resources.cpu),
        num_gpus=pool.resources.gpu,
        memory_bytes=None if memory is None else int(parse_quantity(memory)),
    )


def revision_of(spec: LLMDeploymentSpec) -> str:
    """Hash of what peers must agree on: model, topology, sharding, transport, buffers; not sizes, endpoints or policies."""
    value = spec.model_dump(mode="json", by_alias=True, include={"model", "topology", "transport", "scheduler", "cache"})
    value["model"].pop("name", None)
    value["shards"] = sorted([p.parallelism.tensor, p.parallelism.expert] for p in spec.pools if p.role == "ffn")[:1]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolTemplate:
    """Everything about a pool's workers but their index and epoch."""

    document: LLMDeployment
    pool: str
    checkpoint: str
    directory: str
    host: str
    drain_s: float
    log: LogSettings
    tier_pool: TierPool | None = None  # see WorkerConfig
    cards: tuple[str, ...] = ()  # of workers 0, 1, ...; empty = not dealt out here
    fork_server: str | None = None  # see ServeSettings

    @property
    def spec(self) -> PoolSpec:
        """The pool in the document."""
        return next(pool for pool in self.document.spec.pools if pool.name == self.pool)

    @property
    def revision(self) -> str:
        """See ``revision_of``."""
        return revision_of(self.document.spec)

    def worker(self, index: int, epoch: Epoch) -> WorkerConfig:
        """The configuration of worker ``index``: shards go round the indices, processors are dealt out in equal runs."""
        spec = self.spec
        sharding = spec.parallelism
        return WorkerConfig(
            deployment=self.document.metadata.name,
            model=self.document.model_name,
            revision=self.revision,
            checkpoint=self.checkpoint,
            role=spec.worker_role,
            pool=self.pool,
            index=index,
            epoch=epoch,
            spec=self.document.spec,
            directory=self.directory,
            host=self.host,
            shard=FFNShard.of(index % sharding.num_shards, num_tensor=sharding.tensor, num_expert=sharding.expert),
            threads=spec.num_threads,
            cores=cores_of(spec, index),
            card=self.cards[index % len(self.cards)] if self.cards else "",
            drain_s=self.drain_s,
            log=self.log,
            tier_pool=self.tier_pool,
            document_revision=self.document.metadata.revision,
        )


def cores_of(pool: PoolSpec, index: int) -> tuple[int, ...]:
    """The processors of worker ``index``; empty = not pinned."""
    if not pool.cores or not pool.replicas:
        return ()
    run = len(pool.cores) // pool.replicas
    start = index % pool.replicas * run
    return pool.cores[start : start + run]
