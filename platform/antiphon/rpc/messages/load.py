"""A worker's load as a message of antiphon.rpc.v1, and back (request speed)."""

from __future__ import annotations

from antiphon.core.worker_info import WorkerLoad
from antiphon.rpc.v1 import inference_pb2 as pb

_COUNTS = (
    "num_waiting",
    "num_running",
    "num_free_blocks",
    "num_total_blocks",
    "num_cached_blocks",
    "num_steps",
    "num_prompt_tokens",
    "num_generation_tokens",
    "num_preemptions",
    "num_prefix_hit_tokens",
    "num_prefix_query_tokens",
    "num_peers",
    "num_ffn_rows",
    "num_ffn_batches",
    "num_kv_transfers",
    "num_kv_failures",
    "resident_weight_bytes",
    "resident_memory_bytes",
)


def encode_load(load: WorkerLoad) -> pb.WorkerLoadStatus:
    """The message; what it has no field for stays behind."""
    message = pb.WorkerLoadStatus(gauges=load.gauges)
    for name in _COUNTS:
        setattr(message, name, getattr(load, name))
    return message


def decode_load(message: pb.WorkerLoadStatus) -> WorkerLoad:
    """The value."""
    return WorkerLoad(gauges=dict(message.gauges), **{name: getattr(message, name) for name in _COUNTS})
