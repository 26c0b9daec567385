"""Steps that are computed while the engine goes on: what may follow or run beside them, what they still write (step speed).

    schedule ──► launched ──► (aborts, deadlines, ends that the step before brings) ──► over
                    │                       │
                    │                       └─ a request of it ends: its blocks linger, held, so that nobody else gets what the step
                    │                          still writes; over, they are free
                    └─ behind it, before its tokens are known: all running requests decode one more, each from its pending token,
                       but those whose pending token is their last by length

Nothing is decided ahead that would need a pending token: drafts, grammars, penalties (``draws_from_logits_alone``), or blocks that
are not free, for which somebody would have to be preempted. Must not know: who computes.
"""

from __future__ import annotations

from collections.abc import Sequence

from antiphon.core.step import SchedulerOutput
from antiphon.engine.request_blocks import RequestBlocks
from antiphon.engine.request_state import RequestState
from antiphon.engine.step_values import StepPlan


class StepsInFlight:
    """One and the one launched behind it, or several beside each other. Belongs to the scheduler."""

    def __init__(self, blocks_of: RequestBlocks, max_model_len: int) -> None:
        self._blocks_of = blocks_of
        self._max_model_len = max_model_len
        self._steps: list[SchedulerOutput] = []
        self._lingering: list[RequestState] = []

    def launched(self, step: SchedulerOutput) -> None:
        """It is being computed."""
        self._steps.append(step)

    def over(self, step: SchedulerOutput) -> None:
        """It is computed; free what nothing writes any more."""
        self._steps = [each for each in self._steps if each is not step]
        ended, self._lingering = self._lingering, []
        for state in ended:
            self.release(state)

    def release(self, state: RequestState) -> None:
        """A request has ended: give its blocks back, once no step writes them."""
        if any(state.request_id in step.num_scheduled_tokens for step in self._steps):
            self._lingering.append(state)
        else:
            self._blocks_of.release(state)

    def plan_beside(self, running: Sequence[RequestState], num_lanes: int, *, budget: int, speculates: bool) -> StepPlan | None:
        """One more token of requests that no step in flight has, as many as make ``num_lanes`` of one size of the batch; None where
        there are none, or the batch is not of plain decodes, for which blocks are free.

        Args:
            running: the batch.
            num_lanes: steps in flight at most.
            budget: tokens of a step at most.
            speculates: whether requests that want it get drafts.
        """
        away = {request_id for step in self._steps for request_id in step.num_scheduled_tokens}
        for state in running:
            if state.num_tokens_to_compute != 1 or state.kv_target is not None or state.sequence is not None:
                return None
            if speculates and state.request.sampling.speculates:
                return None
        size = min(-(-len(running) // num_lanes), budget)
        chosen = [state for state in running if state.request_id not in away][:size]
        if not all(self._blocks_of.grow(state, state.num_computed_tokens + 1) for state in chosen):
            return None  # before any of them is told of its new blocks
        plan = StepPlan(budget=size)
        for state in chosen:
            plan.go_on(state, 1)
        return plan if chosen else None

    def plan_behind(self, flying: SchedulerOutput, running: Sequence[RequestState], *, speculates: bool) -> StepPlan | None:
        """One more token of every request of ``flying`` that goes on; None where that can't be said before its tokens are known.

        Args:
            flying: decodes alone.
            running: the batch, all of which must be in it.
            speculates: whether requests that want it get drafts.
        """
        going_on = []
        for state in running:
            sampling, pending = state.request.sampling, state.num_output_tokens + 1
            if (
                state.request_id not in flying.num_scheduled_tokens
                or state.num_tokens_to_compute != 1
                or state.kv_target is not None
            ):
                return None
            if pending >= sampling.max_tokens or len(state.token_ids) + 1 >= self._max_model_len:
                continue
            if not sampling.draws_from_logits_alone(pending) or (speculates and sampling.speculates):
                return None
            going_on.append(state)
        plan = StepPlan(budget=len(going_on))
        for state in going_on:
            if not self._blocks_of.grow(state, state.num_computed_tokens + 2):
                return None
        for state in going_on:
            plan.go_on(state, 1, num_pending=1)
        return plan if going_on else None
