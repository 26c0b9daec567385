"""Linear layers whose weights stay in four bits: a few outputs at a time become numbers, are used, and are forgotten (hot).

An eighth of fp32's memory, and never more than one tile of outputs beside it. Few rows are one call of the compiled kernel. Legend:
T rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from antiphon.models.loading.stored.four_bit import FourBit
from antiphon.models.native.library import available

_KERNEL_MAX_ROWS = 32  # beyond them, arithmetic costs more than bytes: tiles go through a matrix product
_KINDS = ("integer", "line", "e2m1")  # as the kernel numbers them
_TILE_VALUES = 2**19  # of a tile: small enough for the cache that a core has to itself


class FourBitLinear:
    """x_TI @ weight^T + bias_O; ``parts`` are the weight's outputs one after the other, since each may have groups of its own."""

    def __init__(self, parts: Sequence[FourBit], bias_O: torch.Tensor | None = None) -> None:
        self._parts = tuple(parts)
        self._bias = bias_O
        self.out_features = sum(part.shape[0] for part in parts)
        self.in_features = parts[0].shape[1]
        self.num_bytes = sum(part.num_bytes for part in parts)

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias as given."""
        return self._bias

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, O], newly allocated."""
        out = x_TI.new_empty(x_TI.shape[0], self.out_features)
        tile = max(1, _TILE_VALUES // self.in_features)
        at = 0
        for part in self._parts:
            if x_TI.shape[0] <= _KERNEL_MAX_ROWS and _has_kernel(part, x_TI.dtype):
                torch.ops.antiphon.four_bit_linear(
                    *(out[:, at : at + part.shape[0]], x_TI.contiguous(), part.codes_OB, part.scale_OG, part.low_OG),
                    *(part.group_size, _KINDS.index(part.kind)),
                )
                at += part.shape[0]
                continue
            for first in range(0, part.shape[0], tile):
                last = min(first + tile, part.shape[0])
                out[:, at + first : at + last] = F.linear(x_TI, part.values(x_TI.dtype, first, last))
            at += part.shape[0]
        return out if self._bias is None else out.add_(self._bias)


def _has_kernel(part: FourBit, dtype: torch.dtype) -> bool:
    in_runs = part.group_of_I is None and part.group_size % 16 == 0 and part.num_inputs % part.group_size == 0
    return in_runs and dtype in (torch.float32, torch.bfloat16) and available()
