"""What the attention side keeps of a peer and of rows that are away, and the sums of their times (hot).

Must not know: how rows travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from antiphon.connectors.afd.expert_map import Share
from antiphon.connectors.afd.rows import Coded, RowFormat, SlotViews
from antiphon.transport.base import Link, Message


@dataclass(slots=True, kw_only=True)
class StageTimes:
    """Sums since start, in seconds on the attention side's own clock, and what the FFN side reported of itself."""

    num_exchanges: int = 0
    round_trip_s: float = 0.0  # from send to the last partial sum
    blocked_s: float = 0.0  # of it, waiting inside receive()
    ffn_compute_s: float = 0.0  # the slowest shard's, as reported
    ffn_wait_s: float = 0.0  # the slowest shard's queueing, as reported
    num_resent: int = 0
    num_rows_sent: int = 0  # over all shards


@dataclass(slots=True, eq=False)
class Peer:
    """One FFN worker as this end sees it."""

    link: Link
    out: SlotViews
    back: SlotViews
    num_owed: int = 0  # messages it has not answered


@dataclass(slots=True, kw_only=True)
class Exchange:
    """Rows of one ubatch and stream; used again for its next ones."""

    step: int = 0
    layer: int = 0
    num_rows: int = 0
    coded: Coded | None = None
    is_away: bool = False
    sent_s: float = 0.0
    overdue_s: float = 0.0  # when whoever still owes is taken for lost
    shares: Sequence[Share | None] = ()  # by shard; None: the shard gets no row
    waiting_for: set[int] = field(default_factory=set)  # shard indices whose partial sum is not in
    sent_to: list[Peer | None]  # by shard; who has the rows
    parts: list[torch.Tensor | None]  # partial sums by shard, views of the messages they came in
    messages: list[tuple[Link, Message]] = field(default_factory=list)  # to be given back
    compute_us: int = 0
    wait_us: int = 0

    def is_unsent(self, index: int, to: Sequence[Peer]) -> bool:
        """Whether a partial sum is waited for whose rows went to nobody of ``to``."""
        return self.is_away and index in self.waiting_for and self.sent_to[index] not in to

    def give_back(self) -> None:
        """Give the answers' slots back; their parts are no longer valid."""
        for link, message in self.messages:
            link.release(message)
        self.messages.clear()

    def result(self, back: RowFormat) -> torch.Tensor:
        """The sum of what came back in that format, [T, D], in the order of shards, not of arrival: timing must not change it."""
        shares, parts = self.shares, self.parts
        first = parts[0]
        if len(parts) == 1 and first is not None and shares[0] is not None and shares[0].rows_R is None:
            return first
        device = next((part.device for part in parts if part is not None), None)
        out_TD = torch.empty(self.num_rows, back.width, dtype=back.dtype, device=device)
        fresh = True
        for share, part in zip(shares, parts, strict=True):
            if share is None or part is None:
                continue  # a part is None here only where its share is: receive() waits for the others
            if share.rows_R is None:
                if fresh:
                    out_TD.copy_(part)
                else:
                    out_TD.add_(part)
            else:
                if fresh:
                    out_TD.zero_()
                out_TD.index_add_(0, share.rows_R.to(part.device), part)
            fresh = False
        if fresh:
            out_TD.zero_()
        self.give_back()
        return out_TD
