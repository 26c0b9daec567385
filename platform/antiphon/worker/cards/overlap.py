"""Decode steps that a card computes while the next is scheduled and laid out: launched first, collected one step late (step).

    engine:   launch n │ schedule n+1, launch n+1 │ collect n, update │ schedule n+2, launch n+2 │ collect n+1 ...
    card:              │ computes n ....................│ computes n+1 .......................│ computes n+2

    of one request in one step:

    known ──launch──► pending ──collect──► known              its token is the input of its row in the step launched behind
                         │         ├─ no number: the request ends with an error, its blocks are zeroed behind both steps
                         │         └─ ended meanwhile (a stop token in the step before, an abort): the token is dropped, and
                         │            the request's blocks, this token's place with them, are given back by the engine now
                         └─ can't follow (its last token by length): it is not in the step launched behind

Launched is a step of decodes alone whose tokens a card draws (``draws_from_logits_alone``): one with a grammar, a penalty, a bias,
a mask of min_tokens, log-probabilities or drafts is executed, with the tokens of the step before known; so is one that begins,
resumes, preempts or loads a request. Either way each row computes and draws what it would have without any of this.
Must not know: queues, blocks that are free.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from antiphon.core.errors import ErrorInfo
from antiphon.core.request import RequestId
from antiphon.core.step import ModelRunnerOutput, SchedulerOutput
from antiphon.telemetry.step_trace import StepTrace
from antiphon.worker.batch_builder import Run
from antiphon.worker.cards.decode_graphs import NOBODY, DecodeGraphs, InFlight
from antiphon.worker.request_row import RequestRow

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedStep:
    """A step that is being computed."""

    step: SchedulerOutput
    rows: Sequence[RequestRow]
    firsts: Sequence[int]  # the token that each computes
    in_flight: InFlight
    launched_s: float


class Worker(Protocol):
    """The worker whose steps are launched."""

    rows: dict[RequestId, RequestRow]
    wanted_trace: StepTrace | None  # steps are executed while there is one


class Overlap:
    """Launches and collects. Belongs to the worker's loop; at most two steps are in flight."""

    def __init__(
        self,
        graphs: DecodeGraphs,
        worker: Worker,
        *,
        take: Callable[[SchedulerOutput], object],
        refuse: Callable[[RequestRow], ErrorInfo],
        note: Callable[[int, float], None],
    ) -> None:
        """``worker``: whose steps they are; ``take``: takes in what a step changes; ``refuse``: why a request whose rows are no
        numbers ends, and what it wrote is zeroed; ``note``: rows and seconds of a step that is over.
        """
        self._graphs, self._worker = graphs, worker
        self._take, self._refuse, self._note = take, refuse, note
        self._collected_s = 0.0
        self.num_ahead = 0  # steps launched before the tokens of the step before them were known

    def launch(self, step: SchedulerOutput, after: LaunchedStep | None) -> LaunchedStep | None:
        """Ask the card for a step and return before it is computed; None where it has to be executed.

        Args:
            step: the next one.
            after: the one before, where that is not collected yet.
        """
        if self._worker.wanted_trace is not None or not self._can_launch(step, after):
            return None
        self._take(step)
        before = {} if after is None else {row.request_id: number for number, row in enumerate(after.rows)}
        rows = [self._worker.rows[request_id] for request_id in step.num_scheduled_tokens]
        firsts = [row.num_computed_tokens for row in rows]
        now_s = time.perf_counter()
        try:
            with torch.inference_mode():
                in_flight = self._graphs.launch(
                    [
                        Run(token_ids=row.token_ids, block_ids=row.block_ids, first_token=first, num_tokens=1)
                        for row, first in zip(rows, firsts, strict=True)
                    ],
                    [row.draw_at(first) for row, first in zip(rows, firsts, strict=True)],
                    [
                        before[row.request_id] if first == len(row.token_ids) else NOBODY
                        for row, first in zip(rows, firsts, strict=True)
                    ],
                )
        except Exception:  # executing it finds out whose fault it is
            logger.exception("a step of %d requests can't be launched; it is executed", len(rows))
            return None
        if in_flight is None:
            return None
        self.num_ahead += after is not None
        return LaunchedStep(step=step, rows=rows, firsts=firsts, in_flight=in_flight, launched_s=now_s)

    def collect(self, launched: LaunchedStep) -> ModelRunnerOutput:
        """Wait for a launched step; what came of it.

        Raises:
            InternalError: the card does not end it. What else a card fails with is its end too: no later step can be computed.
        """
        launched.in_flight.wait()
        tokens, bad_rows = launched.in_flight.tokens(), launched.in_flight.bad_rows()
        output = ModelRunnerOutput()
        for number, (row, token_id) in enumerate(zip(launched.rows, tokens, strict=True)):
            if number in bad_rows and row.bad_at is None:
                row.bad_at = bad_rows[number]
            if token_id is None or row.bad_at is not None:
                row.num_computed_tokens = launched.firsts[number]  # what it wrote from here on may be no numbers
                with torch.inference_mode():
                    output.errors[row.request_id] = self._refuse(row)
                continue
            row.token_ids.append(token_id)
            row.sampling.append(token_id)
            output.sampled_token_ids[row.request_id] = (token_id,)
        now_s = time.perf_counter()
        self._note(len(launched.rows), now_s - max(launched.launched_s, self._collected_s))
        self._collected_s = now_s
        return output

    def _can_launch(self, step: SchedulerOutput, after: LaunchedStep | None) -> bool:
        """Whether the step is of decodes alone, each of the last known token or the one behind it, drawn on the card."""
        if step.new_requests or step.drafts or step.kv_loads or step.kv_load_aborts or step.states or not step.cached_requests:
            return False
        if not self._graphs.has_room(len(step.num_scheduled_tokens)):
            return False
        pending = set() if after is None else set(after.step.num_scheduled_tokens)
        for cached in step.cached_requests:
            row, first = self._worker.rows[cached.request_id], cached.num_computed_tokens
            is_last = first == len(row.token_ids) - (0 if cached.request_id in pending else 1)
            if not is_last or step.num_scheduled_tokens[cached.request_id] != 1 or row.draw_at(first) is None:
                return False
        return True
