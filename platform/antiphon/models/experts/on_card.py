"""Experts of one layer in a card's memory: an arena of slots, and a table that says where each expert lies (hot).

    slot_of_id   2 -1 0 3 1      an expert comes: its weights are written into a free slot, then its number into the table
                 │    │ │ │      an expert goes: its number leaves the table; the slot is free
    arena        [ ][ ][ ][ ]

The shared expert is as wide as it likes and rows come for it in the last place of their ids, so that it is two plain products.
Nothing asks the host for a value, unless experts of the layer are held elsewhere: then rows may come for one that is not here.

Legend: T rows, D hidden, I intermediate size, K ids per row, S slots. Must not know: peers, checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from antiphon.models.cards import kernels
from antiphon.models.config import Activation


class CardExperts:
    """What ``PackedExperts`` is to a CPU. ``put`` and ``drop`` may run beside ``compute``: the table is written last and first."""

    def __init__(self, num_ids: int, num_routed: int, dtype: torch.dtype, device: torch.device, activation: Activation) -> None:
        """Ids from ``num_routed`` on are the shared expert's."""
        self._num_ids = num_ids
        self._num_routed = num_routed
        self._dtype = dtype
        self._device = device
        self._activation = activation
        self._kernels = kernels()
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        self._num_expected = 0
        self.num_moves = 0  # of weights to other addresses: recorded work reads where they were
        self._gate_up_SID: torch.Tensor | None = None
        self._down_SDI: torch.Tensor | None = None
        self._slot_of_id = torch.full((num_ids,), -1, dtype=torch.int32, device=device)
        self._shared: tuple[torch.Tensor, torch.Tensor] | None = None

    def expect(self, num_experts: int) -> None:
        """As many routed experts will be put: the arena is made once."""
        self._num_expected = num_experts

    @property
    def held(self) -> frozenset[int]:
        """Ids of the experts held now."""
        return frozenset(self._slots) | (frozenset() if self._shared is None else {self._num_routed})

    @property
    def num_bytes(self) -> int:
        """Bytes of the arena and of the shared expert."""
        tensors = [self._gate_up_SID, self._down_SDI, *(self._shared or ())]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def put(self, expert: int, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> tuple[int, int]:
        """Hold an expert; bytes of gate and up, and of down."""
        if expert == self._num_routed:
            self._shared = torch.cat((gate, up)), down.contiguous()
            self.num_moves += 1
            return self._shared[0].nbytes, self._shared[1].nbytes
        gate_up_SID, down_SDI = self._arena(*gate.shape)
        slot = self._free.pop()
        width = gate.shape[0]
        gate_up_SID.select(0, slot).narrow(0, 0, width).copy_(gate)
        gate_up_SID.select(0, slot).narrow(0, width, width).copy_(up)
        down_SDI.select(0, slot).copy_(down)
        self._slots[expert] = slot
        self._slot_of_id.select(0, expert).fill_(slot)
        return gate_up_SID.select(0, slot).nbytes, down_SDI.select(0, slot).nbytes

    def drop(self, expert: int) -> None:
        """Let an expert go."""
        if expert == self._num_routed:
            self._shared = None
            self.num_moves += 1
            return
        self._slot_of_id.select(0, expert).fill_(-1)
        self._free.append(self._slots.pop(expert))

    def compute(
        self, out_TD: torch.Tensor, counts_E: torch.Tensor, rows_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> int | None:
        """Write each row's weighted sum; an id that rows came for and that is not held, or None.

        Raises:
            ValueError: an id is no expert's. Looked at where the ids are in host memory, as those of other processes are.
        """
        if ids_TK.device != self._device:
            self._check(ids_TK)
        ids_TK = ids_TK.to(self._device, torch.int64)
        missing = self._missing(ids_TK)
        if missing is None:
            self.compute_held(out_TD, counts_E, rows_TD, ids_TK, weights_TK.to(self._device))
        return missing

    @property
    def holds_all(self) -> bool:
        """Whether every expert of the layer is here."""
        return len(self.held) == self._num_ids

    def missing(self, ids_TK: torch.Tensor) -> int | None:
        """An id in host memory that is not held, or None. Raises ValueError for one that is no expert's."""
        self._check(ids_TK)
        return self._missing(ids_TK)

    def compute_held(
        self, out_TD: torch.Tensor, counts_E: torch.Tensor, rows_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> None:
        """``compute`` for ids, int64 on the card, all of which are held: nothing is asked of the card. An id that is no expert's
        is none: it may be another process's, and must not end this one's use of the card.
        """
        ids_TK = ids_TK.masked_fill(ids_TK >= self._num_ids, -1)
        takes_TK = ids_TK >= 0
        counts_E.scatter_add_(0, ids_TK.clamp(min=0).flatten(), takes_TK.flatten().to(counts_E.dtype))
        is_shared_TK = ids_TK == self._num_routed
        routed_TK = ids_TK.masked_fill(is_shared_TK, -1)
        if self._gate_up_SID is None or self._down_SDI is None:
            out_TD.zero_()
        else:
            sums_TD, _ = self._kernels.experts(
                rows_TD, routed_TK, weights_TK, self._gate_up_SID, self._down_SDI, self._slot_of_id, self._activation
            )
            out_TD.copy_(sums_TD)
        if self._shared is not None:
            gate_up, down = self._shared
            weight_T1 = torch.where(is_shared_TK, weights_TK, 0.0).sum(dim=1, keepdim=True).to(rows_TD.dtype)
            result_TD = F.linear(self._kernels.gated(F.linear(rows_TD, gate_up), self._activation), down)
            out_TD.add_(torch.where(weight_T1 == 0, 0.0, weight_T1 * result_TD))

    def _check(self, ids_TK: torch.Tensor) -> None:
        if bool(((ids_TK < -1) | (ids_TK >= self._num_ids)).any()):
            raise ValueError("an id is no expert's")

    def _missing(self, ids_TK: torch.Tensor) -> int | None:
        held = self.held
        if len(held) == self._num_ids:
            return None
        is_held_E = torch.tensor([e in held for e in range(self._num_ids)])
        asked = ids_TK.cpu().flatten()
        asked = asked[asked >= 0]
        lost = asked[~is_held_E[asked]]
        return int(lost.min()) if lost.numel() else None

    def _arena(self, width: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._gate_up_SID is None or self._down_SDI is None or not self._free:
            used = len(self._slots)
            # Beyond what was expected, room doubles: experts that move here come one by one.
            size = max(self._num_expected, 1) if used == 0 else min(self._num_ids, 2 * used)
            gate_up = torch.empty((size, 2 * width, hidden), dtype=self._dtype, device=self._device)
            down = torch.empty((size, hidden, width), dtype=self._dtype, device=self._device)
            if self._gate_up_SID is not None and self._down_SDI is not None:
                gate_up[:used].copy_(self._gate_up_SID)
                down[:used].copy_(self._down_SDI)
            self._gate_up_SID, self._down_SDI = gate_up, down
            self.num_moves += 1
            self._free += range(size - 1, used - 1, -1)
        return self._gate_up_SID, self._down_SDI
