"""What memory a worker's pod needs, part by part, and which pools have too little (control speed, pure).

    pod = weights of its role + KV cache, states in it + the worker's own runtime + Ray's processes beside it, and a tenth on top

What is not known counts as nothing, so a pool that is refused is short of memory for certain. Must not know: pods.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from antiphon.core.document.pools import PoolSpec, parse_quantity
from antiphon.core.document.spec import DEFAULT_CACHE_MEMORY, LLMDeploymentSpec
from antiphon.core.ids import Role
from antiphon.core.kv import num_state_slots

# Seen on a cluster with Ray 2.60: a worker of 1.57 GB held 1.07 of KV cache and 0.11 of weights; beside it stood Ray's serve
# replica, ray start, dashboard agent, runtime-env agent, log monitor and raylet with 0.62.
RUNTIME_BYTES = 400_000_000  # interpreter, torch, gRPC
RAY_BYTES = 650_000_000
MARGIN = 0.1  # allocators' fragments, buffers of links, pages of checkpoints being read
_KV_ROLES = ("monolith", "prefill", "decode", "attention")
_GIB = float(2**30)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSizes:
    """What is known of a checkpoint's bytes; None = not known."""

    total_bytes: int | None = None
    ffn_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    draft_bytes: int | None = None  # all of the draft model's; None = there is none, or not known
    state_bytes: int | None = None  # of a sequence at one place, of models whose layers have one; None = none, or not known


NOTHING_KNOWN = WeightSizes()


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """What one worker's pod needs, in bytes; None = not known."""

    weights: int | None
    kv_cache: int | None
    runtime: int = RUNTIME_BYTES
    ray: int = RAY_BYTES

    @property
    def total(self) -> int:
        """All that is known of, and the margin."""
        return int(((self.weights or 0) + (self.kv_cache or 0) + self.runtime + self.ray) * (1 + MARGIN))

    def __str__(self) -> str:
        parts = (("weights", self.weights), ("KV cache", self.kv_cache), ("runtime", self.runtime), ("Ray", self.ray))
        listed = " + ".join(f"{name} {size / _GIB:.2f}" for name, size in parts if size)
        unknown = [name for name, size in parts if size is None]
        left_out = f", {' and '.join(unknown)} not known" if unknown else ""
        return f"{self.total / _GIB:.2f} GiB ({listed}, {MARGIN:.0%} on top{left_out})"


def memory_need(spec: LLMDeploymentSpec, pool: PoolSpec, sizes: WeightSizes) -> MemoryNeed:
    """What one worker of ``pool`` needs. Weights and KV cache of a pool with cards are in their memory, not in the pod's."""
    if pool.resources.gpu:
        return MemoryNeed(weights=0, kv_cache=0)
    weights, drafts = _weights(pool, sizes), sizes.draft_bytes
    if drafts is not None and Role(pool.role).generates:
        weights = (weights or 0) + drafts
    return MemoryNeed(weights=weights, kv_cache=_kv_cache(spec, pool, sizes))


def _weights(pool: PoolSpec, sizes: WeightSizes) -> int | None:
    match pool.role:
        case "ffn":
            return None if sizes.ffn_bytes is None else sizes.ffn_bytes // pool.parallelism.num_shards
        case "attention":
            known = sizes.total_bytes is not None and sizes.ffn_bytes is not None
            return (sizes.total_bytes or 0) - (sizes.ffn_bytes or 0) if known else None
        case _:
            return sizes.total_bytes


def _kv_cache(spec: LLMDeploymentSpec, pool: PoolSpec, sizes: WeightSizes) -> int | None:
    cache = spec.cache
    if pool.role not in _KV_ROLES:
        return 0
    if cache.num_blocks is None:
        return cache.host_memory_bytes
    if sizes.kv_bytes_per_token is None:
        return None
    blocks = cache.num_blocks * cache.block_size_tokens * sizes.kv_bytes_per_token
    return blocks + _states(spec, sizes, blocks)


def _states(spec: LLMDeploymentSpec, sizes: WeightSizes, memory_bytes: int) -> int:
    """Bytes of all state slots of a worker whose cache has so much memory."""
    if not sizes.state_bytes:
        return 0
    num_slots = num_state_slots(
        max_num_seqs=spec.scheduler.max_num_seqs,
        memory_bytes=memory_bytes,
        state_bytes=sizes.state_bytes,
        prefix_caching=spec.cache.prefix_caching,
        num_snapshots=spec.cache.num_snapshots,
    )
    return num_slots * sizes.state_bytes


def memory_problems(spec: LLMDeploymentSpec, sizes: WeightSizes) -> Iterator[str]:
    """What has too little memory, with the figures: a cache for its states or tokens, pools for what a worker needs."""
    room = spec.cache.host_memory_bytes
    states = _states(spec, sizes, room)
    on_host = spec.cache.memory or any(pool.role in _KV_ROLES and pool.worker_device == "cpu" for pool in spec.pools)
    if spec.cache.num_blocks is None and states > room and on_host:  # what a card has left is known where it is
        yield (
            f"spec.cache.memory: {spec.cache.memory or DEFAULT_CACHE_MEMORY} ({room / _GIB:.2f} GiB) is too little for the states "
            f"of {spec.scheduler.max_num_seqs} sequences and of snapshots, which take {states / _GIB:.2f} GiB "
            f"({sizes.state_bytes:,} bytes each); raise it, or lower spec.scheduler.maxNumSeqs"
        )
    elif spec.cache.num_blocks is None and on_host and spec.model.dtype == "auto" and sizes.kv_bytes_per_token:
        block = spec.cache.block_size_tokens
        least = max(block, spec.model.max_model_len or 0)
        if room - states < least * sizes.kv_bytes_per_token:
            asked = "one block" if least == block else "spec.model.maxModelLen"
            yield (
                f"spec.cache.memory: {spec.cache.memory or DEFAULT_CACHE_MEMORY} is too little for the {least} tokens of {asked}, "
                f"which take {least * sizes.kv_bytes_per_token:,} bytes; raise it"
            )
    for i, pool in enumerate(spec.pools):
        if pool.resources.memory is None:
            continue
        given, need = int(parse_quantity(pool.resources.memory)), memory_need(spec, pool, sizes)
        if given < need.total:
            lower = ", or lower spec.cache.memory" if need.kv_cache else ""
            yield (
                f"spec.pools[{i}].resources.memory: {pool.resources.memory} ({given / _GIB:.2f} GiB) is too little for a worker of "
                f"pool {pool.name}, which needs {need}; raise it to {_rounded(need.total)}{lower}"
            )


def _rounded(size: int) -> str:
    """The next whole 128 MiB as a quantity."""
    step = 128 << 20
    return f"{-(-size // step) * 128}Mi"
