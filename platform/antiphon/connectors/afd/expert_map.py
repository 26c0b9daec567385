"""Which rows go to which expert group, and with which ids (hot; attention side).

A map is made from a placement and never changes: rebalancing swaps it for another between two exchanges. Where an expert has
several copies, the row's number chooses one, so equal rows at equal places always go the same way. The shared expert is computed
by a group that the row goes to anyway.

Legend: T rows, R rows of one group, K ids per row, E ids, C copies, G groups. Must not know: links.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from antiphon.models.config import DecoderConfig, MoEConfig
from antiphon.models.experts.placement import ExpertPlacement
from antiphon.models.experts.routing import NO_EXPERT, Routing


@dataclass(slots=True, kw_only=True)
class Share:
    """What one group gets of an exchange."""

    rows_R: torch.Tensor | None  # int64 numbers of the rows that go there; None = all, in order
    num_rows: int
    ids_RK: torch.Tensor | None = None  # int64; None: a dense FFN
    weights_RK: torch.Tensor | None = None  # fp32


@dataclass(slots=True, kw_only=True)
class _Table:
    copies_EC: torch.Tensor  # int64 group of each copy; the row behind the last id is NO_EXPERT's
    num_copies_E: torch.Tensor | None  # int64; None: one each
    has_shared: bool


class ExpertMap:
    """Splits the rows of one exchange by expert group."""

    def __init__(self, config: DecoderConfig, placement: ExpertPlacement, number: int = 0) -> None:
        """``number`` counts the placements of a deployment; it travels with the rows. 0 is the one that serving starts with."""
        placement.check(config)
        self.placement = placement
        self.number = number
        self.num_groups = placement.num_groups
        self._tables = [
            _table(placement.groups[number], ffn) if isinstance(ffn, MoEConfig) else None for number, ffn in enumerate(config.ffns)
        ]

    def split(self, number: int, routing: Routing) -> Sequence[Share | None]:
        """One share per group, None for groups that get no row; ``number`` is the layer's on the wire."""
        ids_TK, weights_TK = routing.ids_TK, routing.weights_TK
        if self.num_groups == 1:
            if routing.is_full:
                return [Share(rows_R=None, num_rows=ids_TK.shape[0], ids_RK=ids_TK, weights_RK=weights_TK)]
            owners_TK = torch.where(ids_TK < 0, NO_EXPERT, 0)
        else:
            if ids_TK.device.type != "cpu":  # which rows go where is decided here: one question to the card, for all groups
                ids_TK, weights_TK = ids_TK.cpu(), weights_TK.cpu()
            owners_TK = self._owners(number, ids_TK)
        shares: list[Share | None] = []
        for group in range(self.num_groups):
            mine_TK = owners_TK == group
            rows_R = mine_TK.any(dim=1).nonzero().flatten()
            num_rows = rows_R.numel()
            if num_rows == 0:
                shares.append(None)
                continue
            ids_RK = ids_TK[rows_R].masked_fill_(~mine_TK[rows_R], NO_EXPERT)
            all_rows = num_rows == ids_TK.shape[0]
            shares.append(
                Share(
                    rows_R=None if all_rows else rows_R,
                    num_rows=num_rows,
                    ids_RK=ids_RK,
                    weights_RK=weights_TK if all_rows else weights_TK[rows_R],
                )
            )
        return shares

    def _owners(self, number: int, ids_TK: torch.Tensor) -> torch.Tensor:
        table = self._tables[number]
        assert table is not None  # only mixtures of experts have a routing
        num_rows, num_ids = ids_TK.shape
        turns_T = torch.arange(number, number + num_rows)
        if table.num_copies_E is None:
            owners_TK = table.copies_EC[:, 0][ids_TK]  # NO_EXPERT, -1, picks the last row
        else:
            owners_TK = table.copies_EC[ids_TK, turns_T[:, None] % table.num_copies_E[ids_TK]]
        if table.has_shared:
            takes_shared_T = ids_TK[:, -1] >= 0
            routed_TK = owners_TK[:, :-1]
            # Any group that the row goes to will do; taking turns over its experts keeps the work even.
            owner_T = routed_TK.gather(1, (turns_T % (num_ids - 1))[:, None]).squeeze(1)
            owner_T = torch.where(owner_T < 0, routed_TK.amax(dim=1), owner_T)
            owner_T = torch.where(owner_T < 0, turns_T % self.num_groups, owner_T)
            owners_TK[:, -1] = torch.where(takes_shared_T, owner_T, NO_EXPERT)
        return owners_TK


def _table(owners: Sequence[Sequence[int]], moe: MoEConfig) -> _Table:
    num_copies = [len(held_by) for held_by in owners]
    width = max(num_copies, default=1)
    rows = [list(held_by) + [held_by[0]] * (width - len(held_by)) for held_by in owners]
    has_shared = moe.shared_intermediate_size > 0
    if has_shared:
        rows.append([0] * width)  # chosen row by row
        num_copies.append(1)
    rows.append([NO_EXPERT] * width)
    num_copies.append(1)
    return _Table(
        copies_EC=torch.tensor(rows, dtype=torch.int64),
        num_copies_E=torch.tensor(num_copies, dtype=torch.int64) if width > 1 else None,
        has_shared=has_shared,
    )
