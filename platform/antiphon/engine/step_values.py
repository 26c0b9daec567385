"""A step while it is decided, and what it tells of each request: all of it once, then differences (step speed).

Must not know: queues, budgets, blocks that are free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from antiphon.core.ids import WorkerId
from antiphon.core.kv import KVLoad
from antiphon.core.request import RequestId
from antiphon.core.step import CachedRequestData, Drafts, NewRequestData, SchedulerOutput, StateStep
from antiphon.engine.request_state import RequestState


@dataclass(slots=True, kw_only=True)
class StepPlan:
    """What a step has so far. A request is in ``new`` or in ``cached``, or its KV is asked for."""

    budget: int  # tokens that it may still have
    num_tokens: dict[RequestId, int] = field(default_factory=dict)  # by request, in the order of rows
    new: dict[RequestId, NewRequestData] = field(default_factory=dict)
    cached: dict[RequestId, CachedRequestData] = field(default_factory=dict)
    drafts: dict[RequestId, Drafts] = field(default_factory=dict)
    loads: list[KVLoad] = field(default_factory=list)
    gone: set[RequestId] = field(default_factory=set)  # those who gave their place in it to others don't come back in it

    def go_on(self, state: RequestState, num_tokens: int, num_pending: int = 0) -> None:
        """A request that the runner knows computes so many tokens more, behind ``num_pending`` that are being computed."""
        self.num_tokens[state.request_id] = num_tokens
        self.cached[state.request_id] = continued(state, num_pending)
        self.budget -= num_tokens

    def admit(self, state: RequestState, num_tokens: int) -> None:
        """A request that the runner does not know begins."""
        self.num_tokens[state.request_id] = num_tokens
        self.new[state.request_id] = announced(state)
        self.budget -= num_tokens

    def leave_out(self, state: RequestState) -> None:
        """A running request gives back what the step had for it, if anything."""
        self.budget += self.num_tokens.pop(state.request_id, 0)
        self.cached.pop(state.request_id, None)

    def add_drafts(self, drafts: Mapping[RequestId, Drafts]) -> None:
        """Of requests that go on."""
        for request_id, each in drafts.items():
            self.drafts[request_id] = each
            self.num_tokens[request_id] += len(each.token_ids)

    def output(
        self, step_id: int, *, finished: Sequence[RequestId], aborts: Sequence[RequestId], states: dict[RequestId, StateStep]
    ) -> SchedulerOutput:
        """The step as it is sent: with the requests that the runner forgets, and the loads that end."""
        return SchedulerOutput(
            step_id=step_id,
            new_requests=tuple(self.new.values()),
            cached_requests=tuple(self.cached.values()),
            num_scheduled_tokens=self.num_tokens,
            drafts=self.drafts,
            finished_request_ids=tuple(finished),
            kv_loads=tuple(self.loads),
            kv_load_aborts=tuple(aborts),
            states=states,
        )


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


def continued(state: RequestState, num_pending: int = 0) -> CachedRequestData:
    """What is new about a request that the runner knows, once ``num_pending`` more tokens are computed."""
    fresh = tuple(state.block_ids[state.num_sent_block_ids :])
    state.num_sent_block_ids = len(state.block_ids)
    num_computed = state.num_computed_tokens + num_pending
    return CachedRequestData(request_id=state.request_id, new_block_ids=fresh, num_computed_tokens=num_computed)


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
