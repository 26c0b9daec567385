"""The KV blocks of a request: its prefix found and taken, more as it grows, full ones left for others to find (step speed).

Must not know: queues, budgets, tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

from antiphon.engine.block_manager import KVBlockManager
from antiphon.engine.limits import SchedulerStats
from antiphon.engine.request_state import RequestState


class RequestBlocks:
    """Gives requests their blocks of one manager, and counts what the prefix cache saved. Belongs to the scheduler."""

    def __init__(self, manager: KVBlockManager, stats: SchedulerStats) -> None:
        self._manager = manager
        self._stats = stats

    def find_prefix(self, state: RequestState) -> list[int]:
        """Cached blocks that the request begins with; not held yet."""
        if state.request.sampling.num_prompt_logprobs is not None:
            return []  # what is in the cache is not computed, and has no likelihoods
        state.update_hashes(self._manager.block_size_tokens)
        # The last known token is always computed, since its logits choose the next one.
        limit = len(state.token_ids) - (0 if state.kv_target is not None else 1)
        return self._manager.find_prefix(state.block_hashes, limit)

    def fits(self, state: RequestState, prefix: Sequence[int]) -> bool:
        """Whether blocks for all its known tokens are free, ``prefix`` held."""
        needed = self._manager.num_blocks_for(len(state.token_ids)) - len(prefix)
        return self._manager.num_free_after(prefix) >= needed

    def take_prefix(self, state: RequestState, prefix: Sequence[int]) -> None:
        """Begin with what ``find_prefix`` found."""
        self._manager.hold(prefix)
        state.block_ids = list(prefix)
        state.num_computed_tokens = len(prefix) * self._manager.block_size_tokens
        state.num_cached_blocks = len(prefix)
        if state.scheduled_s is None:
            state.num_cached_tokens = min(state.num_computed_tokens, state.num_prompt_tokens)
            self._stats.num_prefix_query_tokens += len(state.token_ids)
            self._stats.num_prefix_hit_tokens += state.num_computed_tokens

    def grow(self, state: RequestState, num_tokens: int) -> bool:
        """Have blocks for the first ``num_tokens`` tokens; False, and nothing taken, where there are not enough."""
        needed = self._manager.num_blocks_for(num_tokens) - len(state.block_ids)
        if needed <= 0:
            return True
        fresh = self._manager.allocate(needed)
        if fresh is None:
            return False
        state.block_ids += fresh
        return True

    def cache_full(self, state: RequestState) -> None:
        """Let others find the blocks that are full by now."""
        size = self._manager.block_size_tokens
        num_full = state.num_computed_tokens // size
        if num_full <= state.num_cached_blocks:
            return
        state.update_hashes(size)
        for index in range(state.num_cached_blocks, num_full):
            self._manager.cache(state.block_ids[index], state.block_hashes[index])
        state.num_cached_blocks = num_full

    def release(self, state: RequestState) -> None:
        """Give all of them back."""
        self._manager.release(state.block_ids)
        state.block_ids = []
