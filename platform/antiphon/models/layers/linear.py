"""Linear layers with weights packed once for the machine that runs them (hot).

Best first: our kernels, on Intel's matrix units (bfloat16), on vector units with the weight in blocks (float32; bfloat16 with
AVX-512) or as it lies (bfloat16 without); a row's result does not depend on the rows beside it. Where they are missing or don't
serve the format: oneDNN with its weight reordered at load; the plain operator.
Legend: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import functools
from copy import copy

import torch
import torch.nn.functional as F

from antiphon.device.device import is_card
from antiphon.models.layers.functional import gated
from antiphon.models.native.library import available, tiles_available

# The row count that oneDNN packs for: decode batches. Other counts run on the same packed weight.
PACK_ROWS = 32

_BLOCK = 32  # outputs of a block: kBlock in native/packed/blocks.h


class Linear:
    """x_TI @ weight_OI^T + bias_O, its weight packed at construction."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> None:
        self.in_features = weight_OI.shape[1]
        self.out_features = weight_OI.shape[0]
        self.num_bytes = weight_OI.numel() * weight_OI.element_size()
        self._bias = bias_O
        self._tiles: torch.Tensor | None = None
        self._blocks: torch.Tensor | None = None
        self._packed = False
        self._by_rows = False
        ours = bias_O is None or bias_O.dtype is weight_OI.dtype
        if has_tiles(weight_OI) and ours:
            self._tiles = self._weight = torch.ops.antiphon.pack_weight(weight_OI.contiguous(), False)
        elif _has_blocks(weight_OI) and ours:
            self._blocks = self._weight = torch.ops.antiphon.pack_linear(weight_OI.contiguous())
        elif _has_row_kernel(weight_OI) and ours:
            self._by_rows = True
            self._weight = torch.ops.antiphon.large_zeros(weight_OI.shape, weight_OI.dtype).copy_(weight_OI)
        elif _can_pack(weight_OI):
            self._packed = True
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI, PACK_ROWS)
        else:
            self._weight = weight_OI

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias as given."""
        return self._bias

    @property
    def tiles(self) -> torch.Tensor | None:
        """The weight as our matrix kernels take it; None where they don't serve it."""
        return self._tiles

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, O], newly allocated."""
        result: torch.Tensor
        if self._tiles is not None:
            result = torch.ops.antiphon.tile_linear(x_TI.contiguous(), self._tiles, None, self._bias, self.out_features)
            return result
        if self._blocks is not None:
            result = torch.ops.antiphon.packed_linear(x_TI.contiguous(), self._blocks, self._bias, self.out_features, False)
            return result
        if self._packed:
            result = torch.ops.mkldnn._linear_pointwise(x_TI, self._weight, self._bias, "none", [], "")
            return result
        if self._by_rows:
            result = torch.ops.antiphon.row_linear(x_TI.contiguous(), self._weight, self._bias, False)
            return result
        return F.linear(x_TI, self._weight, self._bias)

    def silu_gated(self, x_TI: torch.Tensor) -> torch.Tensor:
        """silu(first half) * second half of the results, [T, O / 2], newly allocated."""
        out: torch.Tensor
        if self._blocks is not None and self.out_features % (2 * _BLOCK) == 0:
            out = torch.ops.antiphon.packed_gated(x_TI.contiguous(), self._blocks, self._bias, self.out_features)
        else:
            out = gated(self(x_TI), "silu")
        return out

    def in_fp32(self, x_TI: torch.Tensor) -> torch.Tensor:
        """fp32 [T, O], newly allocated; not rounded on the way where our kernels compute it."""
        if self._blocks is not None:
            sums: torch.Tensor = torch.ops.antiphon.packed_linear(
                x_TI.contiguous(), self._blocks, self._bias, self.out_features, True
            )
            return sums
        if self._by_rows:
            wide: torch.Tensor = torch.ops.antiphon.row_linear(x_TI.contiguous(), self._weight, self._bias, True)
            return wide
        if self._tiles is None:
            return self(x_TI).float()
        result: torch.Tensor = torch.ops.antiphon.tile_logits(x_TI.contiguous(), self._tiles, self._bias, self.out_features)
        return result

    def sliced(self, outputs: int) -> list[tuple[int, Linear]]:
        """Views of runs of ``outputs`` outputs with the number of the first; one, of all, where the packed weight can't be cut."""
        by_rows = self._weight if self._tiles is None and self._blocks is None and not self._packed else None
        if self._blocks is None and by_rows is None:
            return [(0, self)]
        assert outputs % _BLOCK == 0
        found = []
        for first in range(0, self.out_features, outputs):
            part = copy(self)
            part.out_features = min(outputs, self.out_features - first)
            part.num_bytes = self.num_bytes * part.out_features // self.out_features
            last = first + part.out_features
            if self._blocks is not None:
                part._blocks = part._weight = self._blocks[first // _BLOCK : -(-last // _BLOCK)]
            else:
                part._weight = self._weight[first:last]
            part._bias = None if self._bias is None else self._bias[first:last]
            found.append((first, part))
        return found

    def best(self, x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The lowest index of each row's largest result, int64 [T], and that result, fp32 [T]; NaN is larger than any number."""
        if self._blocks is not None:
            indices, values = torch.ops.antiphon.packed_best(x_TI.contiguous(), self._blocks, self._bias, self.out_features)
            return indices, values
        if self._tiles is None:
            values, indices = self.in_fp32(x_TI).max(dim=-1)
            return indices, values
        indices, values = torch.ops.antiphon.tile_best(x_TI.contiguous(), self._tiles, self._bias, self.out_features)
        return indices, values


def has_tiles(weight: torch.Tensor) -> bool:
    """Whether our matrix kernels compute with this weight."""
    return weight.device.type == "cpu" and weight.dtype is torch.bfloat16 and tiles_available()


def sums_by_row() -> bool:
    """Whether a bfloat16 row's result, here and in attention, has the same bits whatever rows are beside it: with our kernels."""
    return available()


def _has_blocks(weight: torch.Tensor) -> bool:
    return _on_cpu(weight) and available() and _packs(weight.dtype)


@functools.cache
def _packs(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16) and bool(torch.ops.antiphon.packs(dtype is torch.bfloat16))


def _has_row_kernel(weight: torch.Tensor) -> bool:
    return _on_cpu(weight) and weight.dtype is torch.bfloat16 and available()


def _on_cpu(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and not is_card(weight.device)


def _can_pack(weight: torch.Tensor) -> bool:
    return _on_cpu(weight) and weight.dtype in (torch.float32, torch.bfloat16) and _one_dnn_has(weight.dtype)


def _one_dnn_has(dtype: torch.dtype) -> bool:
    has_it: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_it and (dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
