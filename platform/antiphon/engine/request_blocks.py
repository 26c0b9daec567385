"""The KV blocks of a request, and its state slots where the model has states: found, taken, left for others (step speed).

Must not know: queues, budgets, tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

from antiphon.core.request import RequestId, RequestStatus
from antiphon.core.step import StateStep
from antiphon.engine.block_manager import KVBlockManager
from antiphon.engine.limits import SchedulerStats
from antiphon.engine.request_state import RequestState
from antiphon.engine.state_slots import Prefix, StateSlots


class RequestBlocks:
    """Gives requests their blocks of one manager, and counts what the prefix cache saved. Belongs to the scheduler."""

    def __init__(self, manager: KVBlockManager, stats: SchedulerStats, slots: StateSlots | None = None) -> None:
        """``slots``: of states, None = the model has none."""
        self._manager = manager
        self._slots = slots
        self._stats = stats

    def find_prefix(self, state: RequestState) -> Prefix:
        """What is cached of the request's beginning, as far as it can be gone on from; not held yet."""
        if state.request.sampling.num_prompt_logprobs is not None:
            return Prefix(blocks=())  # what is in the cache is not computed, and has no likelihoods
        state.update_hashes(self._manager.block_size_tokens)
        found = self._manager.find_prefix(state.block_hashes, _num_reusable(state))
        return Prefix(blocks=tuple(found)) if self._slots is None else self._slots.reach(found, state.block_hashes)

    def fits(self, state: RequestState, prefix: Prefix) -> bool:
        """Whether blocks for all its known tokens, and slots for its state, are free, ``prefix`` held."""
        needed = self._manager.num_blocks_for(len(state.token_ids)) - len(prefix.blocks)
        if self._slots is not None and not self._slots.fits(prefix):
            return False
        return self._manager.num_free_after(prefix.blocks) >= needed

    def could_begin(self, state: RequestState, min_remote: int | None) -> bool:
        """Whether all of it fits now. ``min_remote``: it must also be worth asking another worker for at least so many tokens."""
        prefix = self.find_prefix(state)
        num_cached = len(prefix.blocks) * self._manager.block_size_tokens
        return self.fits(state, prefix) and (min_remote is None or state.is_worth_remote(num_cached, min_remote))

    def take_prefix(self, state: RequestState, prefix: Prefix) -> None:
        """Begin with what ``find_prefix`` found."""
        self._manager.hold(prefix.blocks)
        if self._slots is not None:
            state.sequence = self._slots.begin(prefix, _num_reusable(state))
        state.block_ids = list(prefix.blocks)
        state.num_computed_tokens = len(prefix.blocks) * self._manager.block_size_tokens
        state.num_cached_blocks = len(prefix.blocks)
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

    def plan_states(self, states: Mapping[RequestId, RequestState], counts: Mapping[RequestId, int]) -> dict[RequestId, StateStep]:
        """Of all requests of a step; the last decision, since a request may be preempted in the course of others."""
        planned = {name: self.plan_state(states[name], count) for name, count in counts.items()} if self._slots is not None else {}
        return {name: step for name, step in planned.items() if step is not None}

    def plan_state(self, state: RequestState, num_tokens: int) -> StateStep | None:
        """Where the step that computes ``num_tokens`` more reads and writes the request's state; None: the model has none."""
        if self._slots is None or state.sequence is None:
            return None
        state.update_hashes(self._manager.block_size_tokens)
        return self._slots.plan(state.sequence, state.block_hashes, state.num_computed_tokens, num_tokens)

    def computed(self, state: RequestState) -> None:
        """A step is over for the request: let others find the blocks that are full by now, and snapshots."""
        self._cache_full(state)
        if self._slots is not None and state.sequence is not None:
            self._slots.computed(state.sequence, state.block_hashes, state.num_computed_tokens)

    def settle(self, state: RequestState) -> None:
        """All of what was drawn in a step with drafts is taken in: blocks behind the known tokens go back, as the runner does by
        itself, and snapshots behind drafts that were wrong.
        """
        if state.status is not RequestStatus.RUNNING:
            return
        kept = self._manager.num_blocks_for(len(state.token_ids))
        self._manager.release(state.block_ids[kept:])
        del state.block_ids[kept:]
        state.num_sent_block_ids = len(state.block_ids)
        if self._slots is not None and state.sequence is not None:
            self._slots.settle(state.sequence)

    def arrived(self, state: RequestState) -> None:
        """What was computed elsewhere is here."""
        self._cache_full(state)
        if self._slots is not None and state.sequence is not None:
            self._slots.arrived(state.sequence)

    def _cache_full(self, state: RequestState) -> None:
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
        if self._slots is not None and state.sequence is not None:
            self._slots.end(state.sequence)
            state.sequence = None


def _num_reusable(state: RequestState) -> int:
    """Known tokens that need no computing where they are cached: the last one does, since its logits choose the next one."""
    return len(state.token_ids) - (0 if state.kv_target is not None else 1)
