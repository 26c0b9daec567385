"""What drafters may be told of the model's own work: last hidden states of tokens as steps compute them (hot).

Must not know: what becomes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from antiphon.core.request import RequestId
from antiphon.models.decoder import AttentionHalves, StepState
from antiphon.worker.request_row import Scheduled
from antiphon.worker.ubatches.plan import Segment


class HiddenStates(Protocol):
    """Takes them. Belongs to the engine's loop."""

    def take(self, request_id: RequestId, first_token: int, hidden_RD: torch.Tensor) -> None:
        """Hidden states [R, D] behind the last norm, of a request's known tokens [first_token, first_token + R)."""
        ...


def tell_hidden(
    wanted: HiddenStates,
    halves: AttentionHalves,
    batch: Sequence[Scheduled],
    runs: Sequence[Sequence[Segment]],
    states: Sequence[StepState],
) -> None:
    """Hand over the hidden states of a step's tokens that are known by now: not those of drafts that were wrong."""
    for run, state in zip(runs, states, strict=True):
        hidden_TD, at = halves.hidden(state.x_TD), 0
        for segment in run:
            row = batch[segment.request].row
            num_rows = min(segment.num_tokens, len(row.token_ids) - 1 - segment.first_token)
            if num_rows > 0 and row.sampling.params.speculates and row.kv_target is None:
                wanted.take(row.request_id, segment.first_token, hidden_TD[at : at + num_rows].clone())
            at += segment.num_tokens
