"""What a pool computes on, as its document says, and which documents ask for what no worker can do (control speed, pure).

    device   resources.gpu   computes on
    auto     0               cpu
    auto     1               the card that was reserved
    cuda     1               the same
    cpu      0               cpu
    anything else            refused: a card is never reserved and left idle, nor used without having been reserved

Must not know: torch, drivers, or which machine this is.
"""

from __future__ import annotations

from collections.abc import Iterator

from antiphon.core.document.pools import PoolSpec
from antiphon.core.document.spec import LLMDeploymentSpec

DEFAULT_MEMORY_UTILIZATION = 0.9  # the driver, other processes' contexts and fragments of the allocator take the rest


def memory_share(pool: PoolSpec) -> float:
    """Share of its card's memory that one worker of ``pool`` may fill."""
    share = pool.resources.gpu_memory_utilization
    return DEFAULT_MEMORY_UTILIZATION if share is None else share


def device_problems(spec: LLMDeploymentSpec) -> Iterator[tuple[str, str]]:
    """What the pools ask of devices that can't be had: (path from the spec, why), in the pools' order."""
    for i, pool in enumerate(spec.pools):
        path, num_cards = f"pools[{i}]", pool.resources.gpu
        if num_cards > 1:
            yield (
                f"{path}.resources.gpu",
                f"{num_cards} cards per worker: a worker computes on one card; give pool {pool.name} more replicas"
                + (" or a wider parallelism" if pool.role == "ffn" else ""),
            )
        if pool.device == "cuda" and num_cards == 0:
            yield f"{path}.device", f"cuda needs resources.gpu: 1, so that a card is reserved for each worker of pool {pool.name}"
        if pool.device == "cpu" and num_cards > 0:
            yield f"{path}.device", f"cpu would leave the card that resources.gpu reserves for each worker of pool {pool.name} idle"
        if pool.worker_device == "cpu" and pool.resources.gpu_memory_utilization is not None:
            yield f"{path}.resources.gpuMemoryUtilization", f"pool {pool.name} has no card: its resources.gpu is 0"
        if pool.worker_device == "cuda" and pool.worker_role.holds_ffn and spec.model.quantization == "int8":
            yield (
                "model.quantization",
                f"int8 weights are computed with on CPUs only, and pool {pool.name} has a card (pools[{i}].resources.gpu)",
            )
