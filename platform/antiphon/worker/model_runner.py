"""The attention worker: computes steps with its attention halves, the FFN side's answers, and the sampler (hot).

Per step: lay out rows (decodes first), run the plan of ubatch operations, sample where a request's tokens are all computed.
On a prefill worker every layer's K and V of requests that are to be handed over is offered to the KV connector as it is made.
Legend: T rows, D hidden, R sampled rows. Must not know: queues, budgets, text.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial

import torch

from antiphon.connectors.afd.attention_side import AttentionSide
from antiphon.connectors.afd.expert_map import ExpertMap
from antiphon.connectors.kv.decode_side import DecodeSide
from antiphon.connectors.kv.prefill_side import PrefillSide
from antiphon.core.errors import AntiphonError, ErrorInfo, InvalidInput, PeerLost
from antiphon.core.kv import KVTarget
from antiphon.core.request import RequestId, TokenLogprob
from antiphon.core.step import KVEvents, ModelRunnerOutput, NewRequestData, SchedulerOutput
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.decoder import AttentionHalves, StepState
from antiphon.models.prefetch import WeightPrefetch
from antiphon.telemetry.step_trace import Mark, StepTrace
from antiphon.worker.batch_builder import BatchBuilder, Run
from antiphon.worker.sampler import SamplingState, logprobs_of, numbers_only, sample
from antiphon.worker.structure.enforcer import Enforcer
from antiphon.worker.ubatch import Half, Segment, plan_ops, split_segments
from antiphon.worker.ubatch_tuning import UbatchTuner

_NO_KV = KVEvents()
_LIKELIHOOD_ROWS = 32  # of a prompt's logits at once: 6 MB at a vocabulary of 49k

# The same step is computed in other batches after a fault: answers to an earlier attempt must not be taken for the new one's.
_ATTEMPT_SHIFT = 40
# So many requests in a row ended by a fault, and none got a token between: the worker is to blame, and a new one is started.
_MAX_FAULTS = 8

logger = logging.getLogger(__name__)


class _Row:
    """One request as the runner knows it."""

    __slots__ = (
        "bad_at",
        "block_ids",
        "kv_target",
        "num_computed_tokens",
        "num_prompt_tokens",
        "request_id",
        "sampling",
        "token_ids",
    )

    def __init__(self, new: NewRequestData, vocab_size: int, enforcer: Enforcer | None) -> None:
        self.request_id = new.request_id
        self.bad_at: str | None = None  # where this request's rows were first seen not to be numbers
        self.token_ids = list(new.token_ids)
        self.num_prompt_tokens = new.num_prompt_tokens
        self.block_ids = list(new.block_ids)
        self.num_computed_tokens = new.num_computed_tokens
        self.kv_target: KVTarget | None = new.kv_target
        output = self.token_ids[self.num_prompt_tokens :]
        matcher = meter = None
        if new.sampling.rules is not None and new.kv_target is None:
            if enforcer is None:
                raise InvalidInput("this worker has no vocabulary to enforce a grammar with", "grammar")
            matcher, meter = enforcer.begin(new.sampling.rules, new.eos_token_ids, output)
        prompt = self.token_ids[: self.num_prompt_tokens]
        self.sampling = SamplingState(new.sampling, new.eos_token_ids, prompt, output, vocab_size, matcher=matcher, meter=meter)


@dataclass(slots=True, kw_only=True)
class RunnerStats:
    """Since start, in seconds of this worker's own clock."""

    num_steps: int = 0
    num_rows: int = 0
    step_s: float = 0.0
    attention_s: float = 0.0  # attention halves, and adding what comes back to their rows
    send_s: float = 0.0  # handing rows over
    head_s: float = 0.0
    sample_s: float = 0.0  # sampler alone


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
        kv: DecodeSide | PrefillSide | None = None,
        warms: bool = False,
        enforcer: Enforcer | None = None,
    ) -> None:
        """``num_ubatches``: in flight at most; ``tuner``: chooses how many each step gets, None = always as many as there are;
        ``warms``: waits are for another processor, and this one fetches weights meanwhile; ``enforcer``: holds outputs to their
        rules, None = requests have none.
        """
        self.halves = halves
        self.cache = cache
        self.afd = afd
        self.kv = kv
        self.stats = RunnerStats()
        self.enforcer = enforcer
        self.trace: StepTrace | None = None  # set before the first step by who wants one
        self._away: dict[int, int] = {}  # place in flight → FFN layer, while tracing
        self._num_ubatches = num_ubatches
        self._builder = BatchBuilder(cache, halves.device, halves.max_model_len, with_slots=halves.reads_context_slots)
        self._tuner = tuner
        self._plans = {m: plan_ops(halves.config.num_layers, m) for m in range(1, num_ubatches + 1)}
        self._prefetch = WeightPrefetch(halves.first_weights) if warms else None
        self._rows: dict[RequestId, _Row] = {}
        self._experts = afd.experts  # as wanted; the connector takes it between two steps
        self._is_stepping = False
        self._num_faults = 0  # requests that ended by a fault since one last got a token

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
        return _NO_KV if self.kv is None else self.kv.poll()

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
        refused = self._take_changes(step)
        batch = [(self._rows[request_id], n) for request_id, n in step.num_scheduled_tokens.items() if request_id not in refused]
        if not batch:
            return ModelRunnerOutput(errors=refused)
        batch.sort(key=lambda item: item[1] != 1)  # decodes first; the sort is stable
        output = self._run_contained(step.step_id, batch)
        output.errors.update(refused)
        self.stats.num_steps += 1
        self.stats.num_rows += step.num_tokens
        end_s = time.perf_counter()
        self.stats.step_s += end_s - start_s
        if self.trace is not None:
            self.trace.add(Mark.STEP, start_s, end_s, step.step_id, rows=step.num_tokens)
        return output

    # ---- faults ------------------------------------------------------------------------------------------------

    def _run_contained(self, step_id: int, batch: list[tuple[_Row, int]], attempt: int = 0) -> ModelRunnerOutput:
        """One step; a fault in it ends the request it comes of, found by halving the batch, and nobody else's.

        Raises:
            Exception: the fault, once so many requests in a row ended by one that the worker itself is to blame.
        """
        try:
            with torch.inference_mode():
                output = self._run(step_id | attempt << _ATTEMPT_SHIFT, batch)
        except PeerLost as error:
            self.afd.abandon()
            return ModelRunnerOutput(errors={row.request_id: ErrorInfo.of(error) for row, _ in batch})
        except Exception as error:  # noqa: BLE001 - _divide finds out whose it is
            self.afd.abandon()
            return self._divide(step_id, batch, attempt, error)
        if output.sampled_token_ids:
            self._num_faults = 0
        return output

    def _divide(self, step_id: int, batch: list[tuple[_Row, int]], attempt: int, error: Exception) -> ModelRunnerOutput:
        if len(batch) == 1 or any(row.kv_target is not None for row, _ in batch):
            # A hand-over has told its asker of layers already: it can't be computed twice, and the asker computes by itself.
            self._num_faults += len(batch)
            if self._num_faults >= _MAX_FAULTS:
                raise error
            logger.error("a step of %d requests failed, they end", len(batch), exc_info=error)
            for row, _ in batch:
                self.cache.scrub(row.block_ids[row.num_computed_tokens // self.cache.layout.block_size_tokens :])
            return ModelRunnerOutput(errors={row.request_id: ErrorInfo.internal(type(error).__name__) for row, _ in batch})
        middle = len(batch) // 2
        first = self._run_contained(step_id, batch[:middle], 2 * attempt + 1)
        second = self._run_contained(step_id, batch[middle:], 2 * attempt + 2)
        return ModelRunnerOutput(
            sampled_token_ids={**first.sampled_token_ids, **second.sampled_token_ids},
            logprobs={**first.logprobs, **second.logprobs},
            prompt_logprobs={**first.prompt_logprobs, **second.prompt_logprobs},
            errors={**first.errors, **second.errors},
        )

    # ---- inside ------------------------------------------------------------------------------------------------

    def _take_changes(self, step: SchedulerOutput) -> dict[RequestId, ErrorInfo]:
        """Take in what changed since the last step; new requests that can't be taken in, and why."""
        refused: dict[RequestId, ErrorInfo] = {}
        for request_id in step.finished_request_ids:
            self._rows.pop(request_id, None)
            if isinstance(self.kv, PrefillSide):
                self.kv.forget(request_id)
        if isinstance(self.kv, DecodeSide):
            for request_id in step.kv_load_aborts:
                self.kv.abort(request_id)
            for load in step.kv_loads:
                self.kv.start(load)
        for new in step.new_requests:
            try:
                row = _Row(new, self.halves.config.vocab_size, self.enforcer)
            except AntiphonError as error:
                refused[new.request_id] = ErrorInfo.of(error)
                continue
            except Exception as error:
                logger.exception("request %s can't be taken in", new.request_id)
                refused[new.request_id] = ErrorInfo.internal(type(error).__name__)
                continue
            self._rows[new.request_id] = row
            if row.kv_target is not None:
                self._offer_cached(row, row.kv_target)
        for cached in step.cached_requests:
            row = self._rows[cached.request_id]
            row.block_ids += cached.new_block_ids
            row.num_computed_tokens = cached.num_computed_tokens
        return refused

    def _offer_cached(self, row: _Row, target: KVTarget) -> None:
        num_cached = row.num_computed_tokens - target.first_token
        if num_cached > 0 and isinstance(self.kv, PrefillSide):
            slots = self.cache.slots(row.block_ids, target.first_token, num_cached)
            for layer in range(self.halves.config.num_layers):
                self.kv.offer(row.request_id, layer, target.first_token, slots)

    def _run(self, step_id: int, batch: list[tuple[_Row, int]]) -> ModelRunnerOutput:
        segments = [
            Segment(request=i, first_token=row.num_computed_tokens, num_tokens=n) for i, (row, n) in enumerate(batch) if n > 0
        ]
        finals: list[torch.Tensor] = []
        sampled: list[_Row] = []
        likelihoods: dict[RequestId, dict[int, TokenLogprob]] = {}
        if segments:
            runs, states = self._forward_all(step_id, batch, segments)
            for run, state in zip(runs, states, strict=True):
                at = 0
                for segment in run:
                    at += segment.num_tokens
                    row = batch[segment.request][0]
                    is_last = segment.first_token + segment.num_tokens == len(row.token_ids)
                    if row.sampling.params.num_prompt_logprobs is not None:
                        self._note_likelihoods(row, segment, state.x_TD[at - segment.num_tokens : at], likelihoods)
                    if state.bad_rows:
                        self._note_bad(row, state, at - segment.num_tokens, at)
                    if is_last and row.kv_target is None:
                        finals.append(state.x_TD[at - 1 : at])
                        sampled.append(row)
                    elif row.bad_at is None and not _all_numbers(state.x_TD[at - segment.num_tokens : at]):
                        row.bad_at = "the last layer"
        output = self._sample(finals, sampled)
        output.prompt_logprobs.update(likelihoods)
        for row, n in batch:
            if row.bad_at is not None and row.request_id not in output.errors:
                output.errors[row.request_id] = self._refuse(row)
            row.num_computed_tokens += n
            if row.kv_target is not None and isinstance(self.kv, PrefillSide):
                if row.bad_at is not None:
                    self.kv.forget(row.request_id, str(output.errors[row.request_id]))
                elif row.num_computed_tokens >= row.kv_target.first_token + row.kv_target.num_tokens:
                    self.kv.finish(row.request_id)
                self.kv.pump()
        return output

    def _note_likelihoods(
        self, row: _Row, segment: Segment, x_TD: torch.Tensor, found: dict[RequestId, dict[int, TokenLogprob]]
    ) -> None:
        """Log-probabilities of the prompt's tokens that follow the segment's, a few rows of logits at a time."""
        num_top = row.sampling.params.num_prompt_logprobs
        assert num_top is not None
        count = min(segment.num_tokens, row.num_prompt_tokens - 1 - segment.first_token)
        noted = found.setdefault(row.request_id, {})
        for start in range(0, count, _LIKELIHOOD_ROWS):
            end = min(count, start + _LIKELIHOOD_ROWS)
            logits_TV = self.halves.logits(x_TD[start:end])
            if not _all_numbers(logits_TV):
                return  # the request ends with an error of its own
            for offset in range(end - start):
                position = segment.first_token + start + offset + 1
                noted[position] = logprobs_of(logits_TV[offset], row.token_ids[position], num_top)

    def _refuse(self, row: _Row) -> ErrorInfo:
        """Why a request of rows that are non-finite ends. What this step wrote of it may be none either and is zeroed; what steps
        before it wrote are numbers, and others may share those blocks.
        """
        if row.bad_at is None and row.sampling.failure is not None:
            return ErrorInfo.of(InvalidInput(f"the answer's grammar is too complex to go on with: {row.sampling.failure}"))
        self.cache.scrub(row.block_ids[row.num_computed_tokens // self.cache.layout.block_size_tokens :])
        where = "" if row.bad_at is None else f", first seen at {row.bad_at}"
        return ErrorInfo.internal(f"the model's logits are non-finite{where}")

    def _forward_all(
        self, step_id: int, batch: list[tuple[_Row, int]], segments: list[Segment]
    ) -> tuple[list[list[Segment]], list[StepState]]:
        """Cut the step into ubatches and compute them, telling the tuner how long that took."""
        num_rows = sum(segment.num_tokens for segment in segments)
        is_decode = num_rows == len(segments)
        tuner, times = self._tuner, self.afd.times
        wanted = self._num_ubatches if tuner is None else tuner.choose(num_rows, is_decode=is_decode)
        before = (times.num_exchanges, times.ffn_compute_s, times.ffn_wait_s, times.round_trip_s)
        start_s = time.perf_counter()
        runs = split_segments(segments, wanted)
        states = [self._lay_out(batch, run) for run in runs]
        self._forward(step_id, batch, runs, states)
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

    @staticmethod
    def _note_bad(row: _Row, state: StepState, start: int, end: int) -> None:
        if row.bad_at is None:
            row.bad_at = next((gate for at, gate in state.bad_rows.items() if start <= at < end), None)

    def _lay_out(self, batch: list[tuple[_Row, int]], run: list[Segment]) -> StepState:
        rows = [(batch[segment.request][0], segment) for segment in run]
        runs = [
            Run(token_ids=row.token_ids, block_ids=row.block_ids, first_token=part.first_token, num_tokens=part.num_tokens)
            for row, part in rows
        ]
        return self.halves.begin(*self._builder.build(runs))

    def _forward(self, step_id: int, batch: list[tuple[_Row, int]], runs: list[list[Segment]], states: list[StepState]) -> None:
        hands_over = isinstance(self.kv, PrefillSide) and any(row.kv_target is not None for row, _ in batch)
        for op in self._plans[len(runs)]:
            state = states[op.ubatch]
            start_s = time.perf_counter()
            if op.half is Half.ATTEND:
                leaving = self.halves.attend(op.layer, state, self.cache)
                attended_s = time.perf_counter()
                self.stats.attention_s += attended_s - start_s
                for out in leaving:
                    self.afd.send(step_id, out.ffn, out.stream * self._num_ubatches + op.ubatch, out.rows_TD, out.routing)
                    if self.trace is not None:
                        self._trace_send(step_id, out.ffn, out.stream * self._num_ubatches + op.ubatch, attended_s)
                self.stats.send_s += time.perf_counter() - attended_s
                if self.trace is not None:
                    rows = state.x_TD.shape[0]
                    self.trace.add(Mark.ATTEND, start_s, attended_s, step_id, op.layer, op.ubatch, rows)
                if hands_over:
                    self._offer(op.layer, batch, runs[op.ubatch], state)
            else:
                streams = self.halves.streams_due(op.layer)
                if self._prefetch is not None and op.layer + 1 < self.halves.config.num_layers:
                    self._prefetch.warm(op.layer + 1, partial(self.afd.has_arrived, streams[-1] * self._num_ubatches + op.ubatch))
                    self.afd.times.blocked_s += time.perf_counter() - start_s  # a wait, whatever it was used for
                results = [self.afd.receive(stream * self._num_ubatches + op.ubatch) for stream in streams]
                received_s = time.perf_counter()
                self.halves.combine(op.layer, state, results)
                combined_s = time.perf_counter()
                self.stats.attention_s += combined_s - received_s
                if self.trace is not None:
                    for stream in streams:
                        place = stream * self._num_ubatches + op.ubatch
                        self.trace.add(Mark.RECEIVE, start_s, received_s, step_id, self._away[place], place)
                    self.trace.add(Mark.COMBINE, received_s, combined_s, step_id, op.layer, op.ubatch)

    def _trace_send(self, step_id: int, ffn: int, place: int, start_s: float) -> None:
        assert self.trace is not None
        self._away[place] = ffn
        self.trace.add(Mark.SEND, start_s, time.perf_counter(), step_id, ffn, place)

    def _offer(self, layer: int, batch: list[tuple[_Row, int]], run: list[Segment], state: StepState) -> None:
        assert isinstance(self.kv, PrefillSide)
        at = 0
        state.settle()
        are_numbers = _all_numbers(state.x_TD) and not state.bad_rows
        for segment in run:
            row = batch[segment.request][0]
            if not are_numbers:  # such KV never leaves
                end = at + segment.num_tokens
                self._note_bad(row, state, at, end)
                if row.bad_at is None and not _all_numbers(state.x_TD[at:end]):
                    row.bad_at = self.halves.config.layers[layer].prefix.rstrip(".")
            if row.kv_target is not None and row.bad_at is None:
                skip = max(0, row.kv_target.first_token - segment.first_token)
                slots = state.batch.slots_T[at + skip : at + segment.num_tokens]
                self.kv.offer(row.request_id, layer, segment.first_token + skip, slots)
            at += segment.num_tokens
        self.kv.pump()

    def _sample(self, finals: list[torch.Tensor], rows: list[_Row]) -> ModelRunnerOutput:
        if not rows:
            return ModelRunnerOutput()
        start_s = time.perf_counter()
        x_RD = finals[0] if len(finals) == 1 else torch.cat(finals)
        if all(row.sampling.needs_best_only for row in rows):
            ids_R, values_R = self.halves.greedy(x_RD)
            sample_s = time.perf_counter()
            tokens = numbers_only(ids_R, values_R)
        else:
            logits_RV = self.halves.logits(x_RD)
            sample_s = time.perf_counter()
            tokens = sample(logits_RV, [row.sampling for row in rows], [len(r.token_ids) - r.num_prompt_tokens for r in rows])
        self.stats.head_s += sample_s - start_s
        chosen: dict[RequestId, int] = {}
        logprobs: dict[RequestId, TokenLogprob] = {}
        errors: dict[RequestId, ErrorInfo] = {}
        for index, (row, token_id) in enumerate(zip(rows, tokens, strict=True)):  # before any row changes: this may fail
            num_top = row.sampling.params.num_logprobs
            if num_top is not None and token_id is not None and row.bad_at is None:
                logprobs[row.request_id] = logprobs_of(logits_RV[index], token_id, num_top)
        for row, token_id in zip(rows, tokens, strict=True):
            # Rows of such a gate take no expert, so that their logits may well be numbers, of another model.
            if token_id is None or row.bad_at is not None:
                errors[row.request_id] = self._refuse(row)
                continue
            chosen[row.request_id] = token_id
            row.token_ids.append(token_id)
            row.sampling.append(token_id)
        end_s = time.perf_counter()
        self.stats.sample_s += end_s - sample_s
        if self.trace is not None:
            self.trace.add(Mark.SAMPLE, start_s, end_s, rows=len(rows))
        return ModelRunnerOutput(sampled_token_ids=chosen, logprobs=logprobs, errors=errors)

    def close(self) -> None:
        """Close links; idempotent."""
        self.afd.close()
        if self.kv is not None:
            self.kv.close()


def _all_numbers(x_TD: torch.Tensor) -> bool:
    return bool(torch.isfinite(x_TD.sum(dtype=torch.float32)))
