"""Linear layers with int8 weights, one scale per output channel (hot).

Half the memory of bf16. On matrix units each row becomes int8 too, with a scale of its own, and every batch reads half the bytes.
Elsewhere activations stay as they are: few rows run on torch's int8 kernel, which reads half the bytes; many rows convert the
weight on the way, since then arithmetic costs more than bytes. Legend: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from antiphon.models.layers.four_bit import FourBitLinear
from antiphon.models.layers.linear import Linear, has_tiles
from antiphon.models.loading.stored.four_bit import FourBit

_KERNEL_MAX_ROWS = 8
_KERNEL_BLOCK = 32  # the int8 kernel reads whole blocks of inputs
_KERNEL_OUTPUTS = 4
_TILE_OUTPUTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Choice:
    """Which FFN weights become int8. Shared experts and down projections are the sensitive ones and can be left out."""

    shared: bool = True
    down: bool = True


def quantize(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric rounding to [-127, 127]: int8 [O, I] and fp32 scales [O]."""
    weight_OI = weight_OI.float()
    scale_O = weight_OI.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127.0
    return (weight_OI / scale_O[:, None]).round().clamp(-127, 127).to(torch.int8), scale_O


class TileInt8:
    """An int8 weight as our matrix kernels take it; ``pairs``: its halves alternate, as a gate's and an up projection's do."""

    __slots__ = ("num_bytes", "scales", "weight")

    def __init__(self, weight_OI: torch.Tensor, *, pairs: bool = False) -> None:
        int8_OI, scale_O = quantize(weight_OI)
        self.num_bytes = int8_OI.nbytes + scale_O.nbytes
        self.weight: torch.Tensor = torch.ops.antiphon.pack_weight(int8_OI, pairs)
        halves = [F.pad(half, (0, -half.numel() % _TILE_OUTPUTS)) for half in (scale_O.chunk(2) if pairs else (scale_O,))]
        self.scales = torch.stack([half.view(-1, _TILE_OUTPUTS) for half in halves], dim=1).flatten()  # fp32, by packed output


class Int8Linear:
    """x_TI @ (scale_O * weight_OI)^T + bias_O."""

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias as given."""
        return self._bias

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight_OI.shape
        self._bias = bias_O
        self._tiles = TileInt8(weight_OI) if has_tiles(weight_OI) else None
        if self._tiles is not None:
            self.num_bytes = self._tiles.num_bytes
            return
        self._weight_OI, scale_O = quantize(weight_OI)
        self._scale_O = scale_O.to(weight_OI.dtype)
        self.num_bytes = self._weight_OI.numel() + self._scale_O.numel() * self._scale_O.element_size()
        self._has_kernel = (
            weight_OI.device.type == "cpu" and self.in_features % _KERNEL_BLOCK == 0 and self.out_features % _KERNEL_OUTPUTS == 0
        )

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, O], newly allocated."""
        if self._tiles is not None:
            rows: torch.Tensor = torch.ops.antiphon.tile_linear(
                x_TI.contiguous(), self._tiles.weight, self._tiles.scales, self._bias, self.out_features
            )
            return rows
        if self._has_kernel and x_TI.shape[0] <= _KERNEL_MAX_ROWS:
            out: torch.Tensor = torch._weight_int8pack_mm(x_TI.contiguous(), self._weight_OI, self._scale_O)
        else:
            out = F.linear(x_TI, self._weight_OI.to(x_TI.dtype)).mul_(self._scale_O)
        return out if self._bias is None else out.add_(self._bias)


AnyLinear = Linear | Int8Linear | FourBitLinear
Part = torch.Tensor | FourBit  # a weight [O, I] as it is held


def make_linear(weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None, *, int8: bool = False) -> Linear | Int8Linear:
    """A linear layer in the weight's own format or in int8."""
    return Int8Linear(weight_OI, bias_O) if int8 else Linear(weight_OI, bias_O)


def join_linear(parts: Sequence[Part], bias_O: torch.Tensor | None = None, *, int8: bool = False) -> AnyLinear:
    """A linear layer over the outputs of several weights, kept in four bits where all are."""
    four_bit = [part for part in parts if isinstance(part, FourBit)]
    if four_bit and len(four_bit) == len(parts) and not int8:
        return FourBitLinear(four_bit, bias_O)
    dtype = next((part.dtype for part in parts if isinstance(part, torch.Tensor)), torch.float32)
    plain = [part.values(dtype) if isinstance(part, FourBit) else part for part in parts]
    return make_linear(plain[0] if len(plain) == 1 else torch.cat(plain), bias_O, int8=int8)
