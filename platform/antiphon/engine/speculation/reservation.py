"""KV blocks for drafts, taken where they are free; behind the tokens that came, ``RequestBlocks`` gives them back (step speed).

Must not know: queues, where drafts come from.
"""

from __future__ import annotations

from collections.abc import Mapping

from antiphon.core.request import RequestId
from antiphon.core.step import Drafts
from antiphon.engine.block_manager import KVBlockManager
from antiphon.engine.request_state import RequestState
from antiphon.engine.speculation.drafter import DraftAsked
from antiphon.engine.speculation.speculator import Speculator


def most_drafts(state: RequestState, max_model_len: int) -> int:
    """Drafts that could all be taken without the request ending before the token after the last; 0 where it wants none."""
    if not state.request.sampling.speculates or state.kv_target is not None:
        return 0
    left = min(state.request.sampling.max_tokens - state.num_output_tokens, max_model_len - len(state.token_ids))
    return max(0, left - 1)


def draft(
    speculator: Speculator,
    scheduled: Mapping[RequestId, int],
    states: Mapping[RequestId, RequestState],
    blocks: KVBlockManager,
    *,
    room: int,
    max_model_len: int,
) -> dict[RequestId, Drafts]:
    """Drafts for a step of these requests, on blocks that nobody has to be preempted for; none unless all of them decode.

    Args:
        scheduled: tokens by request, drafts left out.
        room: rows that the step may have in all.
    """
    num_rows = len(scheduled)
    decodes = [states[request_id] for request_id, num_tokens in scheduled.items() if num_tokens == 1]
    if not decodes or len(decodes) != num_rows or any(state.num_tokens_to_compute != 1 for state in decodes):
        return {}
    asked = {
        state.request_id: DraftAsked(
            token_ids=state.token_ids,
            num_drafts=num_drafts,
            num_output_tokens=state.num_output_tokens,
            sampling=state.request.sampling,
        )
        for state in decodes
        if (num_drafts := most_drafts(state, max_model_len)) > 0
    }
    found: dict[RequestId, Drafts] = {}
    for request_id, token_ids in speculator.plan(asked, num_rows, room - num_rows).items():
        state = states[request_id]
        fresh = blocks.allocate(max(0, blocks.num_blocks_for(len(state.token_ids) + len(token_ids)) - len(state.block_ids)))
        if fresh is None:
            speculator.withdraw(request_id)
            continue
        state.block_ids += fresh
        state.num_sent_block_ids = len(state.block_ids)
        found[request_id] = Drafts(token_ids=token_ids, new_block_ids=tuple(fresh))
    return found
