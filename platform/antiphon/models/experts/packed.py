"""Experts of one layer packed for the compiled kernel: slots of memory, and the table that the kernel reads (hot).

An expert fills a slot: its gate and up blocks, its down blocks, and the scales of those that are int8. Slots come from one stretch
of memory per layer, since the kernel reads a layer's experts one after the other, and huge pages make that faster. A slot that is
let go is used again, but not before the loop starts its next batch: until then a batch may still be reading it.

Must not know: checkpoints, messages. Legend: I inputs, O outputs, D hidden, W expert width.
"""

from __future__ import annotations

import ctypes
import mmap
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from antiphon.models.config import Activation
from antiphon.models.layers.quantized import quantize
from antiphon.models.native.library import available

_BLOCK = 32  # outputs of a block, to which widths are padded
_ALIGN = 64
_HUGE_PAGE = 2 * 2**20
_ACTIVATIONS: dict[Activation, bool] = {"silu": False, "gelu_tanh": True}  # the kernel's flag
_GATE_UP, _DOWN, _GATE_UP_SCALE, _DOWN_SCALE, _WIDTH, _NUM_COLUMNS = range(6)
_NOT_AN_EXPERT = -2
_DONE = -1


def can_pack(dtype: torch.dtype, device: torch.device, activation: Activation) -> bool:
    """Whether the kernel computes experts of this kind here."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and activation in _ACTIVATIONS and available()


def _padded(size: int, to: int = _BLOCK) -> int:
    return -(-size // to) * to


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Parts:
    """Which weights of an expert are int8."""

    gate_up: bool
    down: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One packed weight within a slot."""

    at: int  # bytes from the slot's start
    num_bytes: int
    scale_at: int | None  # of fp32 scales; None: the weight is not int8
    num_scales: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _SlotLayout:
    """How an expert lies in its slot."""

    width: int  # padded
    gate_up: _Part
    down: _Part
    num_bytes: int

    @classmethod
    def of(cls, hidden: int, width: int, dtype: torch.dtype, int8: Int8Parts) -> _SlotLayout:
        """The layout of experts ``width`` wide."""
        hidden, width = _padded(hidden), _padded(width)
        parts: list[_Part] = []
        end = 0
        for outputs, inputs, is_int8 in ((2 * width, hidden, int8.gate_up), (hidden, width, int8.down)):
            num_bytes = outputs * inputs * (1 if is_int8 else dtype.itemsize)
            scale_at = end + num_bytes if is_int8 else None
            parts.append(_Part(at=end, num_bytes=num_bytes, scale_at=scale_at, num_scales=outputs if is_int8 else 0))
            end = _padded(end + num_bytes + (4 * outputs if is_int8 else 0), _ALIGN)
        return cls(width=width, gate_up=parts[0], down=parts[1], num_bytes=end)


@dataclass(frozen=True, slots=True)
class _Table:
    """What the kernel reads, with the slots that keep its addresses valid; never changed, only replaced."""

    rows: torch.Tensor  # int64 [ids, columns]
    slots: dict[int, torch.Tensor]


class PackedExperts:
    """Packed experts of one layer by id. ``compute`` belongs to the worker's loop; callers of the rest take turns among themselves
    and may run beside it.
    """

    def __init__(self, num_ids: int, dtype: torch.dtype, activation: Activation, int8_of: Callable[[int], Int8Parts]) -> None:
        """``int8_of``: which weights of an expert are held in int8."""
        self._dtype = dtype
        self._pair = 2 if dtype is torch.bfloat16 else 1
        self._gelu = _ACTIVATIONS[activation]
        self._int8_of = int8_of
        self._expected = 0
        self._table = _Table(torch.zeros(num_ids, _NUM_COLUMNS, dtype=torch.int64), {})
        self._free: dict[int, list[torch.Tensor]] = {}  # slots by size in bytes
        self._retired: deque[torch.Tensor] = deque()  # slots let go since the last batch began

    @property
    def held(self) -> frozenset[int]:
        """Ids of the experts held now."""
        return frozenset(self._table.slots)

    @property
    def num_bytes(self) -> int:
        """Bytes of the experts held now."""
        return sum(slot.numel() for slot in self._table.slots.values())

    def expect(self, count: int) -> None:
        """Make room for ``count`` routed experts side by side when the first comes, as they are best read."""
        self._expected = count

    def put(self, expert: int, gate_OI: torch.Tensor, up_OI: torch.Tensor, down_OI: torch.Tensor) -> tuple[int, int]:
        """Pack and hold an expert: gate and up [W, D], down [D, W]; the bytes that gate with up and down take."""
        width, hidden = gate_OI.shape
        layout = _SlotLayout.of(hidden, width, self._dtype, self._int8_of(expert))
        size = layout.num_bytes
        if not self._free.get(size):
            count, self._expected = max(self._expected, 1), 0
            memory = _memory(size * count)
            self._free.setdefault(size, []).extend(memory[i * size : (i + 1) * size] for i in reversed(range(count)))
        slot = self._free[size].pop()
        self._pack(slot, layout.gate_up, gate_OI, up_OI)
        self._pack(slot, layout.down, down_OI, None)
        start = slot.data_ptr()
        rows = self._table.rows.clone()
        row = [0] * _NUM_COLUMNS
        row[_GATE_UP], row[_DOWN], row[_WIDTH] = start + layout.gate_up.at, start + layout.down.at, layout.width
        row[_GATE_UP_SCALE] = 0 if layout.gate_up.scale_at is None else start + layout.gate_up.scale_at
        row[_DOWN_SCALE] = 0 if layout.down.scale_at is None else start + layout.down.scale_at
        rows[expert] = torch.tensor(row, dtype=torch.int64)
        self._table = _Table(rows, {**self._table.slots, expert: slot})
        return layout.down.at, layout.num_bytes - layout.down.at

    def drop(self, expert: int) -> None:
        """Let a held expert go."""
        rows, slots = self._table.rows.clone(), dict(self._table.slots)
        rows[expert] = 0
        slot = slots.pop(expert)
        self._table = _Table(rows, slots)  # before its slot is up for use again
        self._retired.append(slot)

    def compute(
        self, out_TD: torch.Tensor, counts_E: torch.Tensor, rows_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> int | None:
        """Weighted sums of the rows' experts into ``out_TD``; adds to ``counts_E`` the rows each expert had.

        Returns:
            None when done; else an expert that rows came for and that is not held, with nothing done.

        Raises:
            ValueError: an id is no expert's.
        """
        while self._retired:  # no batch runs now, so none reads them
            slot = self._retired.popleft()
            self._free.setdefault(slot.numel(), []).append(slot)
        table = self._table  # keeps its slots until this returns
        status = int(torch.ops.antiphon.experts(out_TD, counts_E, rows_TD, ids_TK, weights_TK, table.rows, self._gelu))
        if status == _NOT_AN_EXPERT:
            raise ValueError("an id is no expert's")
        return None if status == _DONE else status

    def _pack(self, slot: torch.Tensor, part: _Part, first_OI: torch.Tensor, second_OI: torch.Tensor | None) -> None:
        scales: list[torch.Tensor] = []
        if part.scale_at is not None:
            first_OI, first_scale = quantize(first_OI)
            scales = [first_scale]
            if second_OI is not None:
                second_OI, second_scale = quantize(second_OI)
                scales.append(second_scale)
        target = slot[part.at : part.at + part.num_bytes].view(first_OI.dtype)
        torch.ops.antiphon.pack_experts(
            target, first_OI.contiguous(), None if second_OI is None else second_OI.contiguous(), self._pair
        )
        if part.scale_at is not None:
            into = slot[part.scale_at : part.scale_at + 4 * part.num_scales].view(torch.float32)
            into.zero_()
            halves = into.view(-1, len(scales), _BLOCK // 2)  # gate and up take turns, 16 outputs each
            for which, scale in enumerate(scales):
                padded = torch.zeros(halves.shape[0] * halves.shape[2])
                padded[: scale.numel()] = scale
                halves[:, which] = padded.view(halves.shape[0], halves.shape[2])


def _memory(num_bytes: int) -> torch.Tensor:
    """Bytes in huge pages where the system has them, freed with the last tensor on them."""
    if num_bytes < _HUGE_PAGE:
        return torch.empty(num_bytes + _ALIGN, dtype=torch.uint8)[:num_bytes]
    whole = torch.empty(num_bytes + _HUGE_PAGE, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):  # advice: where it is refused, small pages serve
        ctypes.CDLL(None).madvise(ctypes.c_void_p(whole.data_ptr() + start), ctypes.c_size_t(num_bytes), mmap.MADV_HUGEPAGE)
    return whole[start : start + num_bytes]
