"""States of sequences behind guesses that were wrong: made again of the rows that hold, as if there had been no others (hot).

A step moves a state through all of a request's rows, from the slot that it reads to the one that it writes. Where all guesses were
right, that is the state that the next step goes on from. Else what was read is still there: the rows up to the last right one move
it once more, of the layers' own projections, by the arithmetic of any row. No state is copied, and none is kept per guess:

    read R ── t, d1, d2, d3 ──► W        drawn d1, x: d2 and d3 were wrong        R ── t, d1 ──► W

Must not know: what a state is made of, who guesses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from antiphon.core.request import RequestId
from antiphon.models.attention.states import StateRun
from antiphon.models.decoder import StepState
from antiphon.worker.request_row import Scheduled
from antiphon.worker.ubatches.plan import Segment


def take_back_states(
    batch: Sequence[Scheduled],
    runs: Sequence[Sequence[Segment]],
    states: Sequence[StepState],
    drawn: Mapping[RequestId, Sequence[int]],
    blank: int,
) -> None:
    """Have the state of every request behind its known tokens.

    Args:
        batch: a step's requests, as they were before it was computed.
        runs: their rows, by ubatch.
        states: what the ubatches were computed with.
        drawn: tokens by request; as many of its rows hold.
        blank: the slot of zeros.
    """
    ends: dict[int, int] = {}  # one past the last token that holds, by request of the batch
    for number, part in enumerate(batch):
        if part.row.state is not None and 0 < (num_rows := len(drawn.get(part.row.request_id, ()))) <= len(part.drafts):
            ends[number] = part.row.num_computed_tokens + num_rows
    if not ends:
        return
    for run, state in zip(runs, states, strict=True):
        rows: list[int] = []
        again: list[StateRun] = []
        at = 0
        for segment in run:
            num_rows = min(segment.num_tokens, ends.get(segment.request, 0) - segment.first_token)
            if num_rows > 0:
                found = batch[segment.request].state_run(segment.first_token, num_rows, blank)
                assert found is not None
                rows += range(at, at + num_rows)
                again.append(found)
            at += segment.num_tokens
        if again and state.batch.states is not None:
            state.batch.states.redo(rows, again)
