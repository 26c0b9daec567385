"""Decides each step: who runs, how many tokens, which blocks (step speed: synchronous, linear in the batch, no torch, no I/O).

Queues, each request in exactly one:

    waiting ──admit──► running ──finish──► gone
       │ ▲                │
       │ └───preempt──────┘          (blocks go, tokens stay; recomputed, mostly from the prefix cache)
       └──► remote ──KV arrived or failed──► ready, blocks kept ──admit──► running

    running and handed over (prefill role): sending ──KV sent──► gone

Running requests are served before waiting ones; those take turns by tenant (``engine.fairness``), each tenant's in order of
(priority, arrival). The token budget bounds the step, so that long prompts are computed in chunks beside decodes. With a
speculator, what is left of the budget goes to drafts of steps that only decode. Clock is an argument. Must not know: tensors,
peers, text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from antiphon.core.errors import ErrorInfo, InvalidInput, Overloaded
from antiphon.core.kv import KVTarget
from antiphon.core.request import Request, RequestId, RequestOutput, RequestStatus
from antiphon.core.step import KVEvents, ModelRunnerOutput, SchedulerOutput
from antiphon.engine.block_manager import KVBlockManager
from antiphon.engine.deadlines import TOO_LATE, Deadlines
from antiphon.engine.fairness import FairQueue, PromptShares
from antiphon.engine.limits import SchedulerConfig, SchedulerStats, check_cache, check_request, check_room
from antiphon.engine.outcome import end_output, take_tokens, token_output
from antiphon.engine.overlap.in_flight import StepsInFlight
from antiphon.engine.request_blocks import RequestBlocks
from antiphon.engine.request_state import RequestState
from antiphon.engine.speculation.reservation import draft
from antiphon.engine.speculation.speculator import Speculator
from antiphon.engine.state_slots import StateSlots
from antiphon.engine.step_values import StepPlan, load_asked


class Scheduler:
    """Owns all request states and KV blocks of one engine. Only the engine's loop may touch it."""

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float], speculator: Speculator | None = None) -> None:
        """``speculator``: drafts tokens of decodes; None = each gets one a step."""
        check_cache(config)
        self.config = config
        self.stats = SchedulerStats()
        self.blocks = KVBlockManager(config.num_blocks, config.block_size_tokens, prefix_caching=config.prefix_caching)
        self.slots = StateSlots.of(config)  # of sequences' states, where the model has any
        self._blocks_of = RequestBlocks(self.blocks, self.stats, self.slots)
        self.speculator = speculator
        self._clock = clock
        self._states: dict[RequestId, RequestState] = {}
        self._waiting = FairQueue()
        self._ready: list[RequestState] = []
        self._running: list[RequestState] = []
        self._remote: dict[RequestId, RequestState] = {}
        self._sending: dict[RequestId, RequestState] = {}
        self._forgotten: list[RequestId] = []  # the runner must drop these at the next step
        self._load_aborts: list[RequestId] = []
        self._outputs: list[RequestOutput] = []  # ends that came about outside update()
        self.in_flight = StepsInFlight(self._blocks_of, config.max_model_len)
        self._step_id = 0
        self._deadlines = Deadlines()

    # ---- what others may ask -------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Requests that hold no place in the batch: waiting ones and those whose KV is on its way."""
        return len(self._waiting) + len(self._ready) + len(self._remote)

    @property
    def num_running(self) -> int:
        """Requests in the batch, and those whose KV is being handed over."""
        return len(self._running) + len(self._sending)

    @property
    def has_requests(self) -> bool:
        """True while any request is unfinished or the runner has something to forget."""
        return bool(self._states or self._forgotten or self._outputs)

    # ---- requests come and go ------------------------------------------------------------------------------------

    def add(self, request: Request, kv_target: KVTarget | None = None) -> None:
        """Queue a request.

        Raises:
            InvalidInput: empty or too long, or its id is in use.
            Overloaded: the queue is full.
        """
        check_room(request, self.config, is_prompt_only=kv_target is not None or request.sampling.pooling is not None)
        if request.request_id in self._states:
            raise InvalidInput(f"request id {request.request_id!r} is in use", "request_id")
        if len(self._waiting) >= self.config.max_queued_requests:
            full = Overloaded(f"{len(self._waiting)} requests are waiting already", retry_after_s=1.0)
            last = self._waiting.to_give_way(request.tenant)
            if last is None:
                raise full
            self._end(last, RequestStatus.FINISHED_ERROR, ErrorInfo.of(full))
        state = RequestState(request, kv_target)
        self._states[request.request_id] = state
        self._waiting.add(state)
        self._deadlines.note(request.deadline_s)

    def abort(self, request_ids: Iterable[RequestId], error: ErrorInfo | None = None) -> None:
        """End requests now: their blocks are free when this returns. Unknown ids are ignored."""
        for request_id in request_ids:
            state = self._states.get(request_id)
            if state is not None:
                self._end(state, RequestStatus.FINISHED_ABORTED, error)

    def fail(self, request_id: RequestId, error: ErrorInfo) -> None:
        """End a request with an error. An unknown id is ignored."""
        state = self._states.get(request_id)
        if state is not None:
            self._end(state, RequestStatus.FINISHED_ERROR, error)

    # ---- one step ------------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Decide the next step."""
        self._expire()
        self._step_id += 1
        if self.speculator is not None:
            self.speculator.begin()
        plan = StepPlan(budget=self.config.max_num_batched_tokens)
        shares = PromptShares(self._running, self._waiting, budget=plan.budget, num_places=self.config.max_num_seqs)
        self._schedule_running(plan, shares)
        self._schedule_waiting(plan, shares)
        if shares.open_up(self._running, plan.num_tokens):
            self._schedule_running(plan, shares)
            self._schedule_waiting(plan, shares)
        if self.speculator is not None and not plan.new:
            most = {"room": self.config.max_num_batched_tokens, "max_model_len": self.config.max_model_len}
            plan.add_drafts(draft(self.speculator, plan.num_tokens, self._states, self.blocks, **most))
        return self._decided(plan)

    def schedule_ahead(self, flying: SchedulerOutput) -> SchedulerOutput | None:
        """Decide the step behind ``flying``, which is being computed and whose tokens are not known; None where they have to be."""
        return self._beside_others(partial(self.in_flight.plan_behind, flying, self._running))

    def schedule_beside(self, num_lanes: int) -> SchedulerOutput | None:
        """Decide a step of requests that none in flight has, one of ``num_lanes``; None where the whole batch has to be seen."""
        budget = self.config.max_num_batched_tokens
        return self._beside_others(partial(self.in_flight.plan_beside, self._running, num_lanes, budget=budget))

    def _beside_others(self, plan_of: Callable[..., StepPlan | None]) -> SchedulerOutput | None:
        self._expire()
        if self._load_aborts or self._is_anyone_due():
            return None
        plan = plan_of(speculates=self.speculator is not None)
        if plan is None:
            return None
        if self.speculator is not None:
            self.speculator.begin()  # no drafts, and nothing to learn from how long it takes
        self._step_id += 1
        step = self._decided(plan)
        self.in_flight.launched(step)
        return step

    def _decided(self, plan: StepPlan) -> SchedulerOutput:
        states = self._blocks_of.plan_states(self._states, plan.num_tokens)
        output = plan.output(self._step_id, finished=self._forgotten, aborts=self._load_aborts, states=states)
        self._forgotten.clear()
        self._load_aborts.clear()
        return output

    def update(self, step: SchedulerOutput, result: ModelRunnerOutput) -> list[RequestOutput]:
        """Take in what came of a step; returns what each request gained, ends included."""
        outputs: list[RequestOutput] = []
        self.in_flight.over(step)
        if self.speculator is not None:
            self.speculator.note(result.sampled_token_ids, sum(len(drafts.token_ids) for drafts in step.drafts.values()))
        for request_id, num_tokens in step.num_scheduled_tokens.items():
            state = self._states.get(request_id)
            if state is None or state.status is not RequestStatus.RUNNING:
                continue
            error = result.errors.get(request_id)
            if error is not None:
                self._end(state, RequestStatus.FINISHED_ERROR, error)
                continue
            drafts = step.drafts.get(request_id)
            state.num_computed_tokens += num_tokens if drafts is None else 1
            self._blocks_of.computed(state)
            if state.kv_target is not None:
                if state.num_tokens_to_compute == 0:
                    self.stats.num_prompt_tokens += state.kv_target.num_tokens  # no token is sampled here that would count them
                    self._running.remove(state)
                    self._sending[request_id] = state
                continue
            if request_id in result.prompt_logprobs:
                outputs.append(RequestOutput(request_id=request_id, prompt_logprobs=result.prompt_logprobs[request_id]))
            token_ids = result.sampled_token_ids.get(request_id)
            if token_ids is not None:
                outputs.append(self._append(state, token_ids, result))
                if drafts is not None:
                    self._blocks_of.settle(state)
        self.take_kv_events(result.kv)
        return outputs + self.take_outputs()

    def take_kv_events(self, events: KVEvents) -> None:
        """Take in what the KV hand-off saw."""
        for request_id in events.loaded:
            state = self._remote.pop(request_id, None)
            if state is not None:
                self.stats.num_kv_transfers += 1
                state.num_remote_tokens = len(state.token_ids) - 1 - state.num_computed_tokens
                state.num_computed_tokens = len(state.token_ids) - 1
                self._blocks_of.arrived(state)
                self._rejoin(state)
        for request_id, _reason in events.failed:
            state = self._remote.pop(request_id, None)
            if state is not None:
                self.stats.num_kv_failures += 1
                state.prefill_worker = None
                self._rejoin(state)
        for request_id in events.sent:
            state = self._sending.get(request_id)
            if state is not None:
                self.stats.num_kv_transfers += 1
                self._end(state, RequestStatus.FINISHED_STOPPED, None)
        for request in events.arrived:
            try:
                check_request(request, self.config)
                self.add(request, events.targets[request.request_id])
            except (InvalidInput, Overloaded) as error:
                # The asker's lease on this hand-off ends by the runner's "forget", which tells it to compute by itself.
                self._forgotten.append(request.request_id)
                self._outputs.append(RequestOutput(request_id=request.request_id, error=ErrorInfo.of(error)))
        self.abort(events.aborted)  # after the arrivals: one may have come and gone between two looks

    def take_outputs(self) -> list[RequestOutput]:
        """Ends that came about since the last update (aborts, deadlines)."""
        outputs, self._outputs = self._outputs, []
        return outputs

    # ---- scheduling, inside --------------------------------------------------------------------------------------

    def _schedule_running(self, plan: StepPlan, shares: PromptShares) -> None:
        index = 0
        while index < len(self._running) and plan.budget > 0:
            state = self._running[index]
            num_tokens = 0 if state.request_id in plan.num_tokens else min(shares.take(state), plan.budget)
            if not self._grow(state, num_tokens, plan):
                continue  # it preempted itself: the next request moved into its place, or there is none
            if num_tokens > 0:
                plan.go_on(state, num_tokens)
            index += 1

    def _grow(self, state: RequestState, num_tokens: int, plan: StepPlan) -> bool:
        """Give a running request blocks for ``num_tokens`` more, preempting from the tail; False if it was itself preempted."""
        while not self._blocks_of.grow(state, state.num_computed_tokens + num_tokens):
            victim = self._running[-1]
            self._preempt(victim, plan)
            if victim is state:
                return False
        return True

    def _schedule_waiting(self, plan: StepPlan, shares: PromptShares) -> None:
        chosen: RequestState | None = None  # whom a place was made for
        while plan.budget > 0 and (self._ready or self._waiting):
            full = len(self._running) >= self.config.max_num_seqs
            if self._ready and chosen is None:  # they hold blocks that others wait for, so they go first
                turn = self._waiting.next_ready(self._ready, self._running, plan.new, is_full=full)
                if turn is not None:
                    if turn.giver is not None:
                        plan.gone.add(turn.giver.request_id)
                        self._preempt(turn.giver, plan)
                    self._ready.remove(turn.state)
                    self._admit(turn.state, plan)
                    continue
                if not self._waiting.has_light(self._running, self._ready):
                    break
            state = self._waiting.head() if chosen is None else chosen
            if state.request_id in plan.gone or shares.keeps_out(state):
                break
            prefix = self._blocks_of.find_prefix(state)
            # All of what is known must fit at once: admitting on a chunk's worth of blocks would only preempt soon.
            fits = self._blocks_of.fits(state, prefix)
            num_cached_tokens = len(prefix.blocks) * self.config.block_size_tokens
            is_remote = state.is_worth_remote(num_cached_tokens, self.config.remote_prefill_min_tokens)
            if not fits or (full and not is_remote):
                exchange = self._waiting.exchange(self._running, plan.new)
                if exchange is None:
                    break
                chosen, victim = exchange
                plan.gone.add(victim.request_id)
                self._preempt(victim, plan)
                continue
            chosen = None
            self._waiting.take(state, len(state.token_ids) - num_cached_tokens)
            self._blocks_of.take_prefix(state, prefix)
            if is_remote:
                self._start_load(state, plan)
            else:
                self._admit(state, plan)

    def _is_anyone_due(self) -> bool:
        """Whether a request that waits would get a place now."""
        full = len(self._running) >= self.config.max_num_seqs
        if self._ready and self._waiting.next_ready(self._ready, self._running, (), is_full=full) is not None:
            return True
        if not self._waiting or (self._ready and not self._waiting.has_light(self._running, self._ready)):
            return False
        least = self.config.remote_prefill_min_tokens if full else None
        return self._blocks_of.could_begin(self._waiting.head(), least) or self._waiting.exchange(self._running, ()) is not None

    def _admit(self, state: RequestState, plan: StepPlan) -> None:
        """Run a request whose blocks fit, for no tokens where a hand-off is all cached here."""
        num_tokens = min(state.num_tokens_to_compute, plan.budget)
        has_room = self._blocks_of.grow(state, state.num_computed_tokens + num_tokens)
        assert has_room  # the caller saw that all of it fits, or it holds its blocks already
        state.status = RequestStatus.RUNNING
        state.note_scheduled(self._clock())
        plan.admit(state, num_tokens)
        self._running.append(state)

    def _start_load(self, state: RequestState, plan: StepPlan) -> None:
        assert state.prefill_worker is not None
        has_room = self._blocks_of.grow(state, len(state.token_ids))
        assert has_room  # the caller saw that the whole request fits
        state.status = RequestStatus.WAITING_FOR_REMOTE_KV
        state.note_scheduled(self._clock())
        self._remote[state.request_id] = state
        plan.loads.append(load_asked(state, state.prefill_worker, self.config.kv_lease_s))

    def _preempt(self, state: RequestState, plan: StepPlan) -> None:
        plan.leave_out(state)
        self._running.remove(state)
        self._blocks_of.release(state)
        state.num_cached_blocks = 0
        state.num_computed_tokens = 0
        state.num_preemptions += 1
        self.stats.num_preemptions += 1
        state.status = RequestStatus.PREEMPTED
        self._forget(state)
        self._waiting.add(state)

    def _rejoin(self, state: RequestState) -> None:
        """Back from remote KV: ahead of those who hold nothing, with blocks for all its tokens."""
        state.status = RequestStatus.WAITING
        self._ready.append(state)

    # ---- progress, inside ----------------------------------------------------------------------------------------

    def _append(self, state: RequestState, token_ids: Sequence[int], result: ModelRunnerOutput) -> RequestOutput:
        """Take in what a step drew."""
        now_s = self._clock()
        if state.first_token_s is None:
            state.first_token_s = now_s
            self.stats.num_prompt_tokens += state.num_prompt_tokens
        num_taken, status = take_tokens(state, token_ids, self.config.max_model_len, self._blocks_of.computed)
        if state.request.sampling.pooling is None:
            self.stats.num_generation_tokens += num_taken
            for _ in range(num_taken):
                self._waiting.sampled(state.request.tenant)
        if status is not None:
            self._close(state, status)
        logprobs, vector = result.logprobs.get(state.request_id, ()), result.vectors.get(state.request_id, ())
        return token_output(state, token_ids[:num_taken], logprobs[:num_taken], status, now_s, vector)

    # ---- ends, inside --------------------------------------------------------------------------------------------

    def _expire(self) -> None:
        for state in self._deadlines.late(self._states.values(), self._clock()):
            self._end(state, RequestStatus.FINISHED_ABORTED, TOO_LATE)

    def _end(self, state: RequestState, status: RequestStatus, error: ErrorInfo | None) -> None:
        """End a request outside the normal course, and report it."""
        self._close(state, status)
        self._outputs.append(end_output(state, status, error, self._clock()))

    def _close(self, state: RequestState, status: RequestStatus) -> None:
        del self._states[state.request_id]
        if state.status is RequestStatus.RUNNING:
            if state.request_id in self._sending:
                del self._sending[state.request_id]
            else:
                self._running.remove(state)
        elif state.status is RequestStatus.WAITING_FOR_REMOTE_KV:
            del self._remote[state.request_id]
            self._load_aborts.append(state.request_id)
        elif state in self._ready:
            self._ready.remove(state)
        else:
            self._waiting.remove(state)
        self.in_flight.release(state)
        state.status = status
        if self.speculator is not None:
            self.speculator.forget(state.request_id)
        self._forget(state)

    def _forget(self, state: RequestState) -> None:
        if state.known_to_runner:
            self._forgotten.append(state.request_id)
            state.known_to_runner = False
