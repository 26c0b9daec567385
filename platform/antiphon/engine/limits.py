"""An engine's limits and counters (pure values).

Must not know: who enforces them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one engine; the document's scheduler and cache sections, resolved."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_queued_requests: int
    max_model_len: int
    block_size_tokens: int
    num_blocks: int
    prefix_caching: bool = True
    remote_prefill_min_tokens: int = 64
    kv_lease_s: float = 30.0


@dataclass(slots=True, kw_only=True)
class SchedulerStats:
    """Counters since start; read by metrics and leases."""

    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    num_prefix_query_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_kv_transfers: int = 0
    num_kv_failures: int = 0
