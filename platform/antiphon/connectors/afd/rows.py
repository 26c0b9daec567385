"""How rows lie in the messages of the layer exchange, and how they get in and out (hot).

    A2F payload:  ids int32 [R, K] · weights fp32 [R, K] · scales fp32 [R], for int8 rows only · rows [R, D]   (K = 0: a dense FFN)
    F2A payload:  rows [R, D]

Int8 rows are sent with one scale each, the largest magnitude of the row over 127. A row that holds something that is not a number
or not finite arrives as a row that is non-finite.

Legend: T rows of an exchange, R rows of one message, D hidden, K ids per row. Must not know: links, what rows mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from antiphon.models.native.library import available

BYTES_PER_ID = 8  # an expert id (int32) and its weight (fp32)
BYTES_PER_SCALE = 4
_MAX_INT8 = 127.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """Typed views of one message's bytes; absent parts are None."""

    data: torch.Tensor  # the bytes they were made of
    num_rows: int
    num_ids: int
    ids_RK: torch.Tensor | None  # int32
    weights_RK: torch.Tensor | None  # fp32
    scales_R: torch.Tensor | None  # fp32
    rows_RD: torch.Tensor


@dataclass(slots=True, kw_only=True)
class Coded:
    """Rows of an exchange as they travel."""

    rows_TD: torch.Tensor
    scales_T: torch.Tensor | None = None  # fp32; int8 rows only


class RowFormat:
    """Rows of ``width`` numbers of one type."""

    __slots__ = ("_row_bytes", "dtype", "width")

    def __init__(self, dtype: torch.dtype, width: int) -> None:
        self.dtype = dtype
        self.width = width
        self._row_bytes = width * dtype.itemsize + (BYTES_PER_SCALE if dtype is torch.int8 else 0)

    def num_bytes(self, num_rows: int, num_ids: int = 0) -> int:
        """Bytes of a payload."""
        return num_rows * (self._row_bytes + num_ids * BYTES_PER_ID)

    def encode(self, rows_TD: torch.Tensor) -> Coded:
        """Rows of any float type as they travel; the same tensor where nothing has to change."""
        if self.dtype is not torch.int8:
            return Coded(rows_TD=rows_TD if rows_TD.dtype is self.dtype else rows_TD.to(self.dtype))
        scales_T = rows_TD.abs().amax(dim=1).float().mul_(1 / _MAX_INT8)
        # A row of zeros has the scale 0: any divisor will do.
        codes_TD = (rows_TD / scales_T.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_()
        return Coded(rows_TD=codes_TD.to(torch.int8), scales_T=scales_T)

    def write(self, views: Views, coded: Coded, rows_R: torch.Tensor | None) -> None:
        """Put the rows numbered ``rows_R`` (None: all) into a message."""
        _pick(coded.rows_TD, rows_R, views.rows_RD)
        if coded.scales_T is not None and views.scales_R is not None:
            _pick(coded.scales_T, rows_R, views.scales_R)

    @staticmethod
    def read(views: Views, dtype: torch.dtype) -> torch.Tensor:
        """The rows of a message in ``dtype``; a view of the message where nothing has to change."""
        rows_RD = views.rows_RD
        if views.scales_R is not None:
            rows_RD = rows_RD * views.scales_R[:, None]
        return rows_RD if rows_RD.dtype is dtype else rows_RD.to(dtype)

    def views(self, data: torch.Tensor, num_rows: int, num_ids: int = 0) -> Views:
        """``data``, uint8 with room for the payload, as its parts."""
        ids_RK = weights_RK = scales_R = None
        at = num_rows * num_ids * BYTES_PER_ID
        if num_ids:
            head = data[:at].view(torch.int32).view(2, num_rows, num_ids)
            ids_RK, weights_RK = head[0], head[1].view(torch.float32)
        if self.dtype is torch.int8:
            scales_R = data[at : at + num_rows * BYTES_PER_SCALE].view(torch.float32)
            at += num_rows * BYTES_PER_SCALE
        end = at + num_rows * self.width * self.dtype.itemsize
        return Views(
            data=data,
            num_rows=num_rows,
            num_ids=num_ids,
            ids_RK=ids_RK,
            weights_RK=weights_RK,
            scales_R=scales_R,
            rows_RD=data[at:end].view(self.dtype).view(num_rows, self.width),
        )


class SlotViews:
    """The views last made of each slot of one direction of a link, so that a steady load makes none."""

    __slots__ = ("_by_slot", "_format")

    def __init__(self, row_format: RowFormat) -> None:
        self._format = row_format
        self._by_slot: dict[int, Views] = {}

    def of(self, slot: int, data: torch.Tensor, num_rows: int, num_ids: int = 0) -> Views:
        """``RowFormat.views`` of the slot's ``data``."""
        found = self._by_slot.get(slot)
        if found is None or found.data is not data or found.num_rows != num_rows or found.num_ids != num_ids:
            found = self._by_slot[slot] = self._format.views(data, num_rows, num_ids)
        return found


def copy_rows(source_RD: torch.Tensor, target_RD: torch.Tensor) -> None:
    """``source_RD`` into ``target_RD``, contiguous and as large; from or to a card, who commits waits for it: device.ready."""
    if source_RD.is_cpu and target_RD.is_cpu and source_RD.dtype is target_RD.dtype and available():
        torch.ops.antiphon.copy_rows(target_RD, source_RD.contiguous())
    else:
        target_RD.copy_(source_RD, non_blocking=True)


def _pick(source: torch.Tensor, rows_R: torch.Tensor | None, target: torch.Tensor) -> None:
    if rows_R is None:
        copy_rows(source, target)
    elif source.device == target.device:
        torch.index_select(source, 0, rows_R.to(source.device), out=target)
    else:  # from a card into host memory
        target.copy_(source.index_select(0, rows_R.to(source.device)), non_blocking=True)
