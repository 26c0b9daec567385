"""Draws the next tokens of every request, and goes on through its drafts for as long as they are what was drawn (hot).

A row of drafts is a decode of its own: its logits are those of the model after the drafts before it. The draw at a place depends on
(seed, position, logits) and, with penalties or rules, on the tokens before it; so the first is always right, the second if the
first was its draft, and so on. Draws are made in that order, so that nothing a request remembers ever has to go back:

    known ... t │ d1   d2   d3        drawn at t: d1 ✓   at d1: d2 ✓   at d2: x ✗        tokens: d1 d2 x

Legend: R rows, D hidden, V vocabulary. Must not know: blocks, links, who made the drafts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from antiphon.core.request import TokenLogprob
from antiphon.worker.request_row import RequestRow
from antiphon.worker.sampler import all_finite, logprobs_of, sample

logger = logging.getLogger(__name__)


class Drawing:
    """What a step draws for one request, at rows [first_row, first_row + num_rows) of those that are drawn at."""

    __slots__ = ("drafts", "first_row", "logprobs", "num_good", "num_output_tokens", "num_rows", "row", "sampling", "tokens")

    def __init__(self, *, row: RequestRow, first_row: int, drafts: Sequence[int] = ()) -> None:
        """A request whose first row was seen not to be numbers gets no token."""
        self.row = row
        self.sampling = row.sampling
        self.num_output_tokens = row.num_output_tokens
        self.first_row = first_row
        self.drafts = drafts
        self.num_rows = 1 + len(drafts)
        self.num_good = self.num_rows if row.bad_at is None else 0  # leading rows that are numbers, as far as is known
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []

    def end_before(self, row: int) -> None:
        """Row ``row`` of all is none of numbers: nothing is drawn at it or after it."""
        self.num_good = min(self.num_good, row - self.first_row)

    @property
    def is_cut_short(self) -> bool:
        """Whether there are drafts whose KV may not be numbers."""
        return self.num_good < self.num_rows

    def take(self, token_id: int | None) -> bool:
        """Take in what was drawn at the next row; True where the row after it is to be drawn at.

        A draft's row where nothing can be drawn ends the drawing without a word: it may be the next step's first, which then tells.
        """
        at = len(self.tokens)
        if token_id is None or at >= self.num_good:
            return False
        self.tokens.append(token_id)
        self.sampling.append(token_id)
        return at < len(self.drafts) and self.drafts[at] == token_id


def end_at_bad_rows(x_RD: torch.Tensor, drawings: Sequence[Drawing]) -> None:
    """Find drafts' rows that are non-finite: what they leave in the cache is, too."""
    if len(drawings) == x_RD.shape[0] or all_finite(x_RD):
        return
    bad = {row for row, is_good in enumerate(torch.isfinite(x_RD.sum(dim=-1, dtype=torch.float32)).tolist()) if not is_good}
    for drawing in drawings:
        for row in range(drawing.first_row + 1, drawing.first_row + drawing.num_rows):
            if row in bad:
                drawing.end_before(row)


def take_best(best: Sequence[int | None], drawings: Sequence[Drawing]) -> None:
    """Fill in the drawings of requests that want the most likely token and nothing else, from those at all rows."""
    for drawing in drawings:
        row = drawing.first_row
        while drawing.take(best[row]):
            row += 1


def draw_in_turns(logits_RV: torch.Tensor, drawings: Sequence[Drawing]) -> None:
    """Fill in the drawings place by place. A fault at a later place only ends them there.

    Raises:
        Exception: at the first place, before any drawing has changed.
    """
    place, live = 0, list(drawings)
    while live:
        try:
            live = _draw_at(logits_RV, live, place)
        except Exception:
            if place == 0:
                raise
            logger.exception("drafts of %d requests are left at place %d", len(live), place)
            return
        place += 1


def _draw_at(logits_RV: torch.Tensor, live: Sequence[Drawing], place: int) -> list[Drawing]:
    """Draw at one place of each; those that go on."""
    rows = [drawing.first_row + place for drawing in live]
    is_all = len(rows) == logits_RV.shape[0]
    mine_RV = logits_RV if is_all else logits_RV[torch.tensor(rows, device=logits_RV.device)]
    tokens = sample(mine_RV, [drawing.sampling for drawing in live], [drawing.num_output_tokens + place for drawing in live])
    found: list[TokenLogprob | None] = [None] * len(live)
    for index, (drawing, token_id) in enumerate(zip(live, tokens, strict=True)):  # before any of them changes: this may fail
        num_top = drawing.sampling.params.num_logprobs
        if num_top is not None and token_id is not None and place < drawing.num_good:
            found[index] = logprobs_of(mine_RV[index], token_id, num_top)
    going_on = []
    for drawing, token_id, logprob in zip(live, tokens, found, strict=True):
        if drawing.take(token_id):
            going_on.append(drawing)
        if logprob is not None:
            drawing.logprobs.append(logprob)
    return going_on
