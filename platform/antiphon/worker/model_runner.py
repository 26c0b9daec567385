"""The attention worker: lays steps out, has their layers computed, samples, and says what came of each request (step).

Per step: rows laid out decodes first, ``layer_loop`` runs the layers, a token is sampled where a request's tokens are all computed;
and one more for each of its drafts that is what was sampled before it (``verification``).
Legend: T rows, D hidden, R sampled rows. Must not know: queues, budgets, text.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from antiphon.connectors.afd.attention_side import AttentionSide
from antiphon.connectors.afd.expert_map import ExpertMap
from antiphon.core.errors import AntiphonError, ErrorInfo, StructureRefused
from antiphon.core.request import RequestId
from antiphon.core.step import KVEvents, ModelRunnerOutput, SchedulerOutput
from antiphon.device.device import is_card
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.decoder import AttentionHalves, StepState
from antiphon.models.pooling.pooler import Pooler, check_pooling
from antiphon.telemetry.step_trace import Mark, StepTrace
from antiphon.worker.batch_builder import BatchBuilder, Run
from antiphon.worker.cards.decode_graphs import DecodeGraphs, InFlight
from antiphon.worker.cards.overlap import Overlap
from antiphon.worker.cards.split_graphs import SplitGraphs
from antiphon.worker.fault_containment import FaultContainment
from antiphon.worker.kv_roles import KVRole, NoHandOff
from antiphon.worker.layer_loop import LayerLoop
from antiphon.worker.request_row import RequestRow, Scheduled
from antiphon.worker.speculation.hidden_states import HiddenStates
from antiphon.worker.speculation.states_taken_back import take_back_states
from antiphon.worker.step_end import RunnerStats, StepEnd
from antiphon.worker.structure.enforcer import Enforcer
from antiphon.worker.ubatches.lanes import LaneRunner
from antiphon.worker.ubatches.plan import Segment, split_segments
from antiphon.worker.ubatches.tuning import UbatchTuner

Laid = TypeVar("Laid")

logger = logging.getLogger(__name__)


class AttentionWorker:
    """Owns the attention halves and the KV cache of one engine; an ``engine.core.Executor``."""

    def __init__(
        self,
        halves: AttentionHalves,
        cache: KVCache,
        afd: AttentionSide,
        *,
        num_ubatches: int = 1,
        tuner: UbatchTuner | None = None,
        kv: KVRole | None = None,
        warms: bool = False,
        enforcer: Enforcer | None = None,
        pooler: Pooler | None = None,
        hidden_states: HiddenStates | None = None,
        graphs: DecodeGraphs | None = None,
        split_graphs: SplitGraphs | None = None,
    ) -> None:
        """``num_ubatches``: in flight at most; ``tuner``: chooses how many each step gets, None = always as many as there are;
        ``kv``: its part in KV hand-offs, None = it has none; ``warms``: waits are for another processor, and this one fetches
        weights meanwhile; ``enforcer``: holds outputs to their rules, None = requests have none.
        ``pooler``: makes the vectors of a model that does not generate. ``hidden_states``: wants those of requests that speculate.
        ``graphs``, or ``split_graphs`` where FFN halves are elsewhere: decodes alone are replayed from it, where it has room.
        """
        self.halves = halves
        self.cache = cache
        self.afd = afd
        self.stats = stats = RunnerStats()
        self.enforcer = enforcer
        self.pooler = pooler
        self.graphs = graphs
        self.wanted_trace: StepTrace | None = None  # any thread may set it; taken up between two steps
        self._kv: KVRole = NoHandOff() if kv is None else kv
        self._num_ubatches = num_ubatches
        self._builder = BatchBuilder(cache, halves.device, halves.max_model_len, with_slots=halves.reads_context_slots)
        self._tuner = tuner
        self._layers = LayerLoop(halves, cache, afd, num_ubatches=num_ubatches, warms=warms, times=self.stats, graphs=split_graphs)
        self._contained = FaultContainment(self._run, abandon=afd.abandon, scrub=self._scrub)
        self.rows: dict[RequestId, RequestRow] = {}
        self._experts = afd.experts  # as wanted; the connector takes it between two steps
        self._is_stepping = False
        self._replayed: InFlight | None = None  # what this step was, where it was replayed
        self._taken: SchedulerOutput | None = None  # the step whose changes were taken in last
        self.overlap: Overlap | None = None
        if graphs is not None and hidden_states is None:
            self.overlap = Overlap(graphs, self, take=self._take_changes, refuse=self._refuse, note=self._note_step)
        self.step_end = StepEnd(
            halves, cache, self._kv, pooler=pooler, hidden_states=hidden_states, stats=stats, refuse=self._refuse
        )
        self.lanes: LaneRunner | None = None
        if warms and num_ubatches > 1 and pooler is None and hidden_states is None and not is_card(halves.device):
            self.lanes = LaneRunner(
                halves,
                self._layers,
                afd,
                self.step_end,
                self._contained,
                most=num_ubatches,
                is_tuned=tuner is not None,
                may_fly=self._may_fly,
                take=self._take_lane,
                begin=self._begin_lane,
                over=self._lane_over,
            )

    @property
    def trace(self) -> StepTrace | None:
        """Where events of this step go."""
        return self._layers.trace

    def rebalance(self, experts: ExpertMap) -> None:
        """Send rows by another map from the next step on; safe from any thread."""
        self._experts = experts

    @property
    def has_switched(self) -> bool:
        """True when no row will leave by an older map than the last one given to ``rebalance``; safe from any thread.

        A step takes the next map before its first row leaves, so a worker that is between two steps has as good as switched.
        """
        return self._experts is self.afd.experts or not self._is_stepping

    @property
    def experts(self) -> ExpertMap | None:
        """The map that the next step uses; safe from any thread."""
        return self._experts

    # ---- engine.core.Executor ----------------------------------------------------------------------------------

    def poll_kv(self) -> KVEvents:
        """What the KV hand-off saw since last asked."""
        return self._kv.poll()

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Compute one step. A lost FFN that nobody replaces ends the step's requests with errors, not the worker."""
        self._is_stepping = True  # before the next map is looked for: whoever sees False knows that it will be taken
        try:
            return self._execute(step)
        finally:
            self._is_stepping = False
            self.afd.rest()

    def _execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        start_s = time.perf_counter()
        self.afd.experts = self._experts  # between two steps no exchange is in flight
        self._layers.trace = self.wanted_trace
        refused = self._take_changes(step)
        found = step.drafts.get
        batch = [
            Scheduled(row=self.rows[request_id], num_tokens=n, drafts=drafts.token_ids if (drafts := found(request_id)) else ())
            for request_id, n in step.num_scheduled_tokens.items()
            if request_id not in refused
        ]
        if not batch:
            return ModelRunnerOutput(errors=refused)
        # Decodes first, and of them those without drafts: others' states run through row by row. The sort is stable.
        batch.sort(key=lambda part: (not part.is_decode, bool(part.drafts)))
        output = self._contained.run(step.step_id, batch)
        output.errors.update(refused)
        end_s = time.perf_counter()
        self._note_step(step.num_tokens, end_s - start_s)
        if self.lanes is not None and not step.new_requests and not step.drafts and all(part.is_decode for part in batch):
            self.lanes.executed(len(batch), start_s, end_s)
        if self.trace is not None:
            self.trace.add(Mark.STEP, start_s, end_s, step.step_id, rows=step.num_tokens)
        return output

    # ---- lanes -------------------------------------------------------------------------------------------------

    def _may_fly(self) -> bool:
        return self.wanted_trace is None and self._experts is self.afd.experts and not self.afd.has_arrivals

    def _take_lane(self, step: SchedulerOutput) -> list[Scheduled]:
        self._is_stepping = True
        self._layers.trace = None
        self._take_changes(step)
        self.afd.look_after_spares()
        return [Scheduled(row=self.rows[name], num_tokens=count) for name, count in step.num_scheduled_tokens.items()]

    def _begin_lane(self, batch: Sequence[Scheduled], segments: list[Segment]) -> StepState:
        return self._with_runs(batch, segments, lambda runs: self.halves.begin(*self._builder.build(runs)))

    def _lane_over(self, num_rows: int, seconds: float, others_fly: bool) -> None:
        self._note_step(num_rows, seconds)
        if not others_fly:
            self._is_stepping = False
            self.afd.rest()

    # ---- inside ------------------------------------------------------------------------------------------------

    def _note_step(self, num_rows: int, seconds: float) -> None:
        self.stats.num_steps += 1
        self.stats.num_rows += num_rows
        self.stats.step_s += seconds

    def _take_changes(self, step: SchedulerOutput) -> dict[RequestId, ErrorInfo]:
        """Take in what changed since the last step; new requests that can't be taken in, and why."""
        refused: dict[RequestId, ErrorInfo] = {}
        if step is self._taken:  # it was to be launched, and could not be
            return refused
        self._taken = step
        for request_id in step.finished_request_ids:
            self.rows.pop(request_id, None)
        self._kv.begin(step)
        for new in step.new_requests:
            try:
                if new.kv_target is None:
                    check_pooling(self.pooler, new.sampling.pooling)
                row = RequestRow(new, self.halves.config.vocab_size, self.enforcer)
            except AntiphonError as error:
                refused[new.request_id] = ErrorInfo.of(error)
                continue
            except Exception as error:
                logger.exception("request %s can't be taken in", new.request_id)
                refused[new.request_id] = ErrorInfo.internal(type(error).__name__)
                continue
            self.rows[new.request_id] = row
            self._kv.take(row)
        for cached in step.cached_requests:
            row = self.rows[cached.request_id]
            row.block_ids += cached.new_block_ids
            row.num_computed_tokens = cached.num_computed_tokens
        for request_id, state in step.states.items():
            if request_id not in refused:
                self.rows[request_id].state = state
        for request_id, drafts in step.drafts.items():
            self.rows[request_id].block_ids += drafts.new_block_ids
        return refused

    def _run(self, exchange_id: int, batch: Sequence[Scheduled]) -> ModelRunnerOutput:
        segments = [segment for i, part in enumerate(batch) for segment in part.segments(i)]
        runs: list[list[Segment]] = []
        states: list[StepState] = []
        self._replayed = None
        if segments:
            runs, states = self._forward(exchange_id, batch, segments)
        found = self.step_end.gather(batch, runs, states)
        output = self.step_end.draw(found, replayed=self._replayed, trace=self.trace)
        take_back_states(batch, runs, states, output.sampled_token_ids, self.cache.blank_state)
        return self.step_end.end(batch, runs, states, found, output)

    def _refuse(self, row: RequestRow) -> ErrorInfo:
        """Why a request of rows that are non-finite ends. What this step wrote of it may be none either and is zeroed; what steps
        before it wrote are numbers, and others may share those blocks.
        """
        if row.bad_at is None and row.sampling.failure is not None:
            return ErrorInfo.of(StructureRefused(f"the answer can't be held to its grammar: {row.sampling.failure}"))
        self._scrub(row)
        where = "" if row.bad_at is None else f", first seen at {row.bad_at}"
        return ErrorInfo.internal(f"the model's logits are non-finite{where}")

    def _scrub(self, row: RequestRow) -> None:
        blocks = row.block_ids[row.num_computed_tokens // self.cache.layout.block_size_tokens :]
        if self.graphs is not None:
            self.graphs.behind(lambda: self.cache.scrub(blocks))  # a step that is being computed may write there
            return
        self.cache.scrub(blocks)

    def _forward(
        self, exchange_id: int, batch: Sequence[Scheduled], segments: list[Segment]
    ) -> tuple[list[list[Segment]], list[StepState]]:
        """Cut the step into ubatches and compute them, telling the tuner how long that took."""
        num_rows = sum(segment.num_tokens for segment in segments)
        is_decode = num_rows == len(segments)
        tuner, times = self._tuner, self.afd.times
        wanted = self._num_ubatches if tuner is None else tuner.choose(num_rows, is_decode=is_decode)
        before = (times.num_exchanges, times.ffn_compute_s, times.ffn_wait_s, times.round_trip_s)
        start_s = time.perf_counter()
        if self.graphs is not None and is_decode and self.trace is None and not self._kv.is_due(batch):
            draws, launch = [batch[each.request].row.draw_at(each.first_token) for each in segments], self.graphs.launch
            self._replayed = self._with_runs(batch, segments, lambda runs: launch(runs, draws))
            if self._replayed is not None:
                self._replayed.wait()
                self._replayed.state.bad_rows = self._replayed.bad_rows()
                return [segments], [self._replayed.state]
        runs = split_segments(segments, wanted)
        states = [self._with_runs(batch, run, partial(self._begin, ubatch)) for ubatch, run in enumerate(runs)]

        def attended(layer: int, ubatch: int) -> None:
            self._kv.offer(layer, batch, runs[ubatch], states[ubatch])

        self._layers.run(exchange_id, states, attended if self._kv.is_worth_it(batch) else None)
        for state in states:
            state.settle()
        if tuner is not None:
            num_exchanges = max(1, times.num_exchanges - before[0])
            ffn_s, wait_s, away_s = times.ffn_compute_s - before[1], times.ffn_wait_s - before[2], times.round_trip_s - before[3]
            tuner.note(
                num_rows,
                len(runs),
                is_decode=is_decode,
                step_s=time.perf_counter() - start_s,
                t_ffn_s=ffn_s / num_exchanges,
                t_transfer_s=max(0.0, away_s - ffn_s - wait_s) / 2 / num_exchanges,
            )
        return runs, states

    def _begin(self, ubatch: int, runs: Sequence[Run]) -> StepState:
        return self._layers.begin(ubatch, *self._builder.build(runs))

    def _with_runs(self, batch: Sequence[Scheduled], run: list[Segment], use: Callable[[Sequence[Run]], Laid]) -> Laid:
        """``use`` of the ubatch's rows."""
        rows = [(batch[segment.request].row, segment) for segment in run]
        runs = [
            Run(
                token_ids=row.token_ids,
                block_ids=row.block_ids,
                first_token=part.first_token,
                num_tokens=part.num_tokens,
                state=batch[part.request].state_run(part.first_token, part.num_tokens, self.cache.blank_state),
            )
            for row, part in rows
        ]
        guessing = [part for part in batch if part.drafts]
        for part in guessing:  # for as long as ids are read: nothing else may take them for known
            part.row.token_ids += part.drafts
        try:
            return use(runs)
        finally:
            for part in guessing:
                del part.row.token_ids[-len(part.drafts) :]

    def close(self) -> None:
        """Close links; idempotent."""
        self.afd.close()
        self._kv.close()
