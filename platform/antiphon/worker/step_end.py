"""What becomes of a step's last rows: tokens, likelihoods, vectors, errors, and what each request remembers (step speed).

    gather: the rows that are drawn at ──► head (whole here, or in slices elsewhere) ──► draw: tokens ──► end: counts, hand-offs

Legend: T rows, D hidden, R rows that are drawn at. Must not know: layers, links, queues.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from antiphon.core.errors import ErrorInfo
from antiphon.core.request import RequestId, TokenLogprob
from antiphon.core.step import ModelRunnerOutput
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.decoder import AttentionHalves, StepState
from antiphon.models.head import HeadResult
from antiphon.models.pooling.pooler import Pooler
from antiphon.telemetry.step_trace import Mark, StepTrace
from antiphon.worker.cards.decode_graphs import InFlight
from antiphon.worker.encoding.last_rows import pool_rows
from antiphon.worker.kv_roles import KVRole
from antiphon.worker.layer_loop import LayerTimes
from antiphon.worker.request_row import RequestRow, Scheduled
from antiphon.worker.sampler import all_finite, numbers_only, prompt_logprobs
from antiphon.worker.speculation.hidden_states import HiddenStates, tell_hidden
from antiphon.worker.speculation.verification import Drawing, draw_in_turns, end_at_bad_rows, take_best
from antiphon.worker.ubatches.plan import Segment


@dataclass(slots=True, kw_only=True)
class RunnerStats(LayerTimes):
    """Since start, in seconds of this worker's own clock."""

    num_steps: int = 0
    num_rows: int = 0
    step_s: float = 0.0
    head_s: float = 0.0
    sample_s: float = 0.0  # sampler alone


@dataclass(slots=True, kw_only=True)
class Gathered:
    """The rows that are drawn at, of whom, and what else the step's rows told."""

    rows: list[torch.Tensor] = field(default_factory=list)  # each [1, D]
    drawings: dict[RequestId, Drawing] = field(default_factory=dict)
    likelihoods: dict[RequestId, dict[int, TokenLogprob]] = field(default_factory=dict)
    x_RD: torch.Tensor | None = None  # ``rows`` in one, once asked for

    def joined(self) -> torch.Tensor:
        """The rows that are drawn at, [R, D]; drafts' rows that are no numbers are found on the way."""
        if self.x_RD is None:
            self.x_RD = self.rows[0] if len(self.rows) == 1 else torch.cat(self.rows)
            end_at_bad_rows(self.x_RD, list(self.drawings.values()))
        return self.x_RD

    @property
    def needs_best_only(self) -> bool:
        """Whether no request looks at more than its likeliest token."""
        return all(drawing.sampling.needs_best_only for drawing in self.drawings.values())


class StepEnd:
    """Belongs to the worker's loop."""

    def __init__(
        self,
        halves: AttentionHalves,
        cache: KVCache,
        kv: KVRole,
        *,
        pooler: Pooler | None,
        hidden_states: HiddenStates | None,
        stats: RunnerStats,
        refuse: Callable[[RequestRow], ErrorInfo],
    ) -> None:
        """``refuse``: why a request whose rows are no numbers ends, and what it wrote is zeroed; ``stats``: added to."""
        self._halves, self._cache, self._kv = halves, cache, kv
        self._pooler, self._hidden_states = pooler, hidden_states
        self.stats, self._refuse = stats, refuse

    def gather(self, batch: Sequence[Scheduled], runs: Sequence[Sequence[Segment]], states: Sequence[StepState]) -> Gathered:
        """Look at the rows that the last layer left, ubatch by ubatch."""
        found = Gathered()
        finals, drawings = found.rows, found.drawings
        for run, state in zip(runs, states, strict=True):
            at = 0
            for segment in run:
                at += segment.num_tokens
                part = batch[segment.request]
                row = part.row
                if segment.first_token >= len(row.token_ids):  # a draft's
                    if at - 1 in state.bad_rows:
                        drawings[row.request_id].end_before(len(finals))
                    finals.append(state.x_TD[at - 1 : at])
                    continue
                is_last = segment.first_token + segment.num_tokens == len(row.token_ids)
                if row.sampling.params.num_prompt_logprobs is not None:
                    self._note_likelihoods(row, segment, state.x_TD[at - segment.num_tokens : at], found.likelihoods)
                if state.bad_rows:
                    row.note_bad(state, at - segment.num_tokens, at)
                if is_last and row.kv_target is None:
                    drawings[row.request_id] = Drawing(row=row, first_row=len(finals), drafts=part.drafts)
                    finals.append(state.x_TD[at - 1 : at])
                elif row.bad_at is None and not all_finite(state.x_TD[at - segment.num_tokens : at]):
                    row.bad_at = "the last layer"
        return found

    def _note_likelihoods(
        self, row: RequestRow, segment: Segment, x_TD: torch.Tensor, found: dict[RequestId, dict[int, TokenLogprob]]
    ) -> None:
        """Log-probabilities of the prompt's tokens that follow the segment's."""
        num_top = row.sampling.params.num_prompt_logprobs
        assert num_top is not None
        count = max(0, min(segment.num_tokens, row.num_prompt_tokens - 1 - segment.first_token))
        noted = prompt_logprobs(self._halves.logits, x_TD[:count], row.token_ids, segment.first_token + 1, num_top)
        found.setdefault(row.request_id, {}).update(noted)

    def draw(
        self, found: Gathered, *, replayed: InFlight | None = None, head: HeadResult | None = None, trace: StepTrace | None = None
    ) -> ModelRunnerOutput:
        """Draw tokens, or pool vectors.

        Args:
            found: the rows.
            replayed: the step as a card computed it, if one did.
            head: what it says of the rows; None = it is asked here.
            trace: where this is noted.
        """
        drawings = list(found.drawings.values())
        if not drawings:
            return ModelRunnerOutput()
        stats = self.stats
        start_s = sample_s = time.perf_counter()
        if self._pooler is not None:  # such a model generates nothing, so that all rows want vectors
            output = pool_rows(self._pooler, self._halves, found.rows, [drawing.row for drawing in drawings], self._refuse)
            stats.head_s += time.perf_counter() - start_s
            return output
        if replayed is not None and len(found.rows) != replayed.num_rows:  # some rows are of prompts that go on
            replayed = None
        x_RD = found.joined()
        if replayed is not None:
            sample_s = time.perf_counter()
            on_host = [drawing for drawing in drawings if not all(replayed.is_drawn[drawing.first_row :][: drawing.num_rows])]
            if on_host:
                draw_in_turns(replayed.logits_RV, on_host)  # first: it may fail, and nothing has changed then
            take_best(replayed.tokens(), [drawing for drawing in drawings if drawing not in on_host])
        else:
            if head is None:
                best_only = found.needs_best_only
                head = HeadResult(best=self._halves.greedy(x_RD)) if best_only else HeadResult(logits_RV=self._halves.logits(x_RD))
                sample_s = time.perf_counter()
            if head.best is not None:
                take_best(numbers_only(*head.best), drawings)
            else:
                assert head.logits_RV is not None
                draw_in_turns(head.logits_RV, drawings)
        stats.head_s += sample_s - start_s
        output = ModelRunnerOutput()
        for drawing in drawings:
            row = drawing.row
            if not drawing.tokens:
                output.errors[row.request_id] = self._refuse(row)
                continue
            output.sampled_token_ids[row.request_id] = tuple(drawing.tokens)
            if drawing.logprobs:
                output.logprobs[row.request_id] = tuple(drawing.logprobs)
            row.token_ids += drawing.tokens
            if drawing.is_cut_short:
                past = row.num_computed_tokens + drawing.num_good
                self._cache.scrub_slots(self._cache.slots(row.block_ids, past, drawing.num_rows - drawing.num_good))
        end_s = time.perf_counter()
        stats.sample_s += end_s - sample_s
        if trace is not None:
            trace.add(Mark.SAMPLE, start_s, end_s, rows=len(found.rows))
        return output

    def end(
        self,
        batch: Sequence[Scheduled],
        runs: Sequence[Sequence[Segment]],
        states: Sequence[StepState],
        found: Gathered,
        output: ModelRunnerOutput,
    ) -> ModelRunnerOutput:
        """``output`` with what else there is to say, and every request's counts as they are behind the step."""
        output.prompt_logprobs.update(found.likelihoods)
        if self._hidden_states is not None:
            tell_hidden(self._hidden_states, self._halves, batch, runs, states)
        for part in batch:
            row = part.row
            if row.bad_at is not None and row.request_id not in output.errors:
                output.errors[row.request_id] = self._refuse(row)
            row.num_computed_tokens += part.num_tokens - len(part.drafts)
            if part.drafts:
                row.num_computed_tokens += max(0, len(output.sampled_token_ids.get(row.request_id, ())) - 1)
                del row.block_ids[-(-len(row.token_ids) // self._cache.layout.block_size_tokens) :]  # as the scheduler does
            self._kv.end(row, output.errors.get(row.request_id))
        return output
