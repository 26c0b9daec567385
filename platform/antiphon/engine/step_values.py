"""What a step tells the runner of a request: all of it once, then differences; and what it asks of a prefill worker (step speed).

Must not know: queues, budgets, blocks that are free.
"""

from __future__ import annotations

from antiphon.core.ids import WorkerId
from antiphon.core.kv import KVLoad
from antiphon.core.step import CachedRequestData, NewRequestData
from antiphon.engine.request_state import RequestState


def announced(state: RequestState) -> NewRequestData:
    """A request that the runner does not know; from now on it does."""
    state.num_sent_block_ids = len(state.block_ids)
    state.known_to_runner = True
    return NewRequestData(
        request_id=state.request_id,
        token_ids=tuple(state.token_ids),
        num_prompt_tokens=state.num_prompt_tokens,
        block_ids=tuple(state.block_ids),
        num_computed_tokens=state.num_computed_tokens,
        sampling=state.request.sampling,
        eos_token_ids=state.request.eos_token_ids,
        kv_target=state.kv_target,
    )


def continued(state: RequestState) -> CachedRequestData:
    """What is new about a request that the runner knows."""
    fresh = tuple(state.block_ids[state.num_sent_block_ids :])
    state.num_sent_block_ids = len(state.block_ids)
    return CachedRequestData(request_id=state.request_id, new_block_ids=fresh, num_computed_tokens=state.num_computed_tokens)


def load_asked(state: RequestState, prefill_worker: str, lease_s: float) -> KVLoad:
    """KV of all its tokens but the last, without what is computed: asked of ``prefill_worker`` for at most ``lease_s`` seconds."""
    num_tokens = len(state.token_ids) - 1
    return KVLoad(
        request_id=state.request_id,
        prefill_worker=WorkerId(prefill_worker),
        token_ids=tuple(state.token_ids[:num_tokens]),
        first_token=state.num_computed_tokens,
        num_tokens=num_tokens - state.num_computed_tokens,
        block_ids=tuple(state.block_ids),
        deadline_s=lease_s,
        traceparent=state.request.traceparent,
        cache_salt=state.request.cache_salt,
        tenant=state.request.tenant,
        state_slot=None if state.sequence is None else state.sequence.arrival,
    )
