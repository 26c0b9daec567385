"""How a worker's cache memory is shared out between KV blocks, states of running sequences, and snapshots (control speed, pure).

Must not know: tensors, who schedules.
"""

from __future__ import annotations

from dataclasses import dataclass

from antiphon.core.document.spec import LLMDeploymentSpec
from antiphon.core.errors import InvalidInput
from antiphon.core.kv import KVLayout, num_state_slots


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRoom:
    """Blocks, and state slots (None: the model has no states)."""

    num_blocks: int
    num_state_slots: int | None


def cache_room(spec: LLMDeploymentSpec, layout: KVLayout, max_model_len: int, memory_bytes: int) -> CacheRoom:
    """What the document's cache section comes to for a model of this layout, with ``memory_bytes`` where it gives no ``numBlocks``.

    Raises:
        InvalidInput: the memory holds no block, or states of as many sequences as may run leave none for blocks.
    """
    if not layout.has_state:
        num_blocks = memory_bytes // layout.block_bytes if spec.cache.num_blocks is None else spec.cache.num_blocks
        if num_blocks < 1:
            raise InvalidInput(
                f"{memory_bytes:,} bytes hold no block of {spec.cache.block_size_tokens} tokens, which takes "
                f"{layout.block_bytes:,}: more memory",
                "spec.cache.memory",
            )
        return CacheRoom(num_blocks=num_blocks, num_state_slots=None)
    if spec.cache.num_blocks is not None:
        memory_bytes = spec.cache.num_blocks * layout.block_bytes
    num_slots = num_state_slots(
        max_num_seqs=spec.scheduler.max_num_seqs,
        memory_bytes=memory_bytes,
        state_bytes=layout.state_bytes,
        prefix_caching=spec.cache.prefix_caching,
        num_snapshots=spec.cache.num_snapshots,
    )
    if spec.cache.num_blocks is not None:
        return CacheRoom(num_blocks=spec.cache.num_blocks, num_state_slots=num_slots)
    if not layout.kv_layers:  # tokens cost nothing: as many as all sequences can have
        num_blocks = layout.num_blocks_for(max_model_len) * spec.scheduler.max_num_seqs
    else:
        num_blocks = (memory_bytes - num_slots * layout.state_bytes) // layout.block_bytes
    if num_slots * layout.state_bytes > memory_bytes or num_blocks < 1:
        raise InvalidInput(
            f"{num_slots} states, of {spec.scheduler.max_num_seqs} sequences and of snapshots, take "
            f"{num_slots * layout.state_bytes:,} bytes of the cache's {memory_bytes:,}: more memory, or a smaller "
            "scheduler.maxNumSeqs",
            "spec.cache.memory",
        )
    return CacheRoom(num_blocks=num_blocks, num_state_slots=num_slots)
