"""The FFN halves of a worker on a card, recorded once per layer and number of rows, and replayed (hot).

    rows of one or more peers ──► static rows, ids, weights ──► replay of the smallest recording that fits ──► static result

Rows that a recording has beyond those that came take no expert; what a dense half makes of them is read by nobody. Which experts
rows want is known to the host, where the rows came through its memory: it looks for those that are not held before it replays, and
reads them. Rows that lie on the card are replayed where every expert of the layer is held. A layer whose weights have moved since
(an arena of experts that grew) is computed eagerly from then on.

Legend: R rows, D hidden, K ids per row. Must not know: peers, messages.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from antiphon.device.graphs import Graphs, NotRecordable, Recorded
from antiphon.models.decoder import FFNHalves
from antiphon.models.experts.routing import NO_EXPERT

# As few as the attention side's lanes have: there is a recording for every layer of each.
_SIZES = (1, 4, 8, 16, 32, 64, 128, 256)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of one peer for one layer, where they arrived."""

    rows_RD: torch.Tensor
    ids_RK: torch.Tensor | None  # None: a dense FFN
    weights_RK: torch.Tensor | None


class FFNGraphs:
    """Owns the static tensors and what was recorded on them. Not thread-safe: the worker's loop alone uses it."""

    def __init__(self, halves: FFNHalves, graphs: Graphs, device: torch.device, *, experts_per_row: Sequence[int | None]) -> None:
        """``device``: the halves'; ``experts_per_row``: by layer number on the wire, as the connector counts them."""
        self._halves, self._graphs = halves, graphs
        self._banks = halves.banks
        self._experts_per_row = tuple(experts_per_row)
        most = _SIZES[-1]
        most_ids = max(count or 0 for count in experts_per_row)
        self._rows_RD = torch.zeros(most, halves.config.hidden_size, dtype=halves.dtype, device=device)
        self._ids_RK = torch.full((most, most_ids), NO_EXPERT, dtype=torch.int64, device=device)
        self._weights_RK = torch.zeros(most, most_ids, dtype=torch.float32, device=device)
        self._out_RD = torch.zeros_like(self._rows_RD)
        self._recorded: dict[tuple[int, int], Recorded] = {}  # by layer and rows
        self._moved: dict[int, int] = {}  # how often each layer's experts had moved when it was recorded
        self.num_replays = 0

    def record(self) -> None:
        """Record every layer, the most rows first. What can't be recorded is computed eagerly, and the log says why."""
        numbers = [number for number, count in enumerate(self._experts_per_row) if count is not None]
        try:
            for size in reversed(_SIZES):
                for number in numbers:
                    with torch.inference_mode():
                        replayed, _ = self._graphs.record(partial(self._compute, number, size))
                    self._recorded[number, size] = replayed
        except NotRecordable as error:
            logger.warning("FFN halves are not recorded, they are computed eagerly: %s", error)
            self._recorded.clear()
        except torch.OutOfMemoryError:
            logger.warning("the card has no room for all recordings: batches of %d rows and fewer are computed eagerly", size)
        self._moved = {number: bank.num_moves for number, bank in self._banks.items()}
        logger.info("recorded %d FFN halves", len(self._recorded))

    def compute(self, number: int, parts: Sequence[Rows]) -> torch.Tensor | None:
        """The partial sum of every part's rows, one after the other, true until the next call; None where it is not recorded.

        Raises:
            InvalidInput: an id is no expert's.
        """
        count = sum(part.rows_RD.shape[0] for part in parts)
        size = next((size for size in _SIZES if size >= count), 0)
        recorded = self._recorded.get((number, size))
        if recorded is None:
            return None
        num_ids = self._experts_per_row[number] or 0
        bank = self._banks.get(number)
        if bank is not None:
            for part in parts:
                assert part.ids_RK is not None  # the connector refuses rows without ids for a mixture of experts
                if not bank.hold_for(part.ids_RK):
                    return None
            if bank.num_moves != self._moved[number]:
                return None
        at = 0
        for part in parts:
            end = at + part.rows_RD.shape[0]
            self._rows_RD[at:end].copy_(part.rows_RD)
            if part.ids_RK is not None and part.weights_RK is not None:
                self._ids_RK[at:end, :num_ids].copy_(part.ids_RK)
                self._weights_RK[at:end, :num_ids].copy_(part.weights_RK)
            at = end
        if num_ids and count < size:
            self._ids_RK[count:size].fill_(NO_EXPERT)
        recorded.replay()
        self.num_replays += 1
        return self._out_RD[:count]

    def _compute(self, number: int, size: int) -> None:
        bank, num_ids, rows_RD = self._banks.get(number), self._experts_per_row[number], self._rows_RD[:size]
        if bank is None:
            result_RD = self._halves.compute(number, rows_RD)
        else:
            result_RD = bank.compute_held(rows_RD, self._ids_RK[:size, :num_ids], self._weights_RK[:size, :num_ids])
        self._out_RD[:size].copy_(result_RD)
