"""A gated FFN of two linear layers, down(act(gate(x)) * up(x)): one kernel call where the machine has matrix units (hot).

Legend: T rows, D hidden, I intermediate size. Must not know: shards, experts, checkpoints.
"""

from __future__ import annotations

import torch

from antiphon.models.config import Activation
from antiphon.models.layers.functional import gated
from antiphon.models.layers.linear import has_tiles
from antiphon.models.layers.quantized import AnyLinear, TileInt8, make_linear


class GatedFFN:
    """gate and up in one projection, their product, the projection down."""

    def __init__(
        self,
        gate_up_2ID: torch.Tensor,
        down_DI: torch.Tensor,
        activation: Activation,
        *,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        int8_gate_up: bool = False,
        int8_down: bool = False,
    ) -> None:
        self._activation = activation
        self._width = down_DI.shape[1]
        self._has_tiles = activation == "silu" and has_tiles(gate_up_2ID)
        if self._has_tiles:
            gate_up, gate_up_scales, gate_up_bytes = _packed(gate_up_2ID, int8=int8_gate_up, pairs=True)
            down, down_scales, down_bytes = _packed(down_DI, int8=int8_down, pairs=False)
            self._parts = gate_up, gate_up_scales, gate_up_bias, down, down_scales, down_bias
            self.num_bytes = gate_up_bytes, down_bytes  # of gate and up; of down
        else:
            self._gate_up: AnyLinear = make_linear(gate_up_2ID, gate_up_bias, int8=int8_gate_up)
            self._down: AnyLinear = make_linear(down_DI, down_bias, int8=int8_down)
            self.num_bytes = self._gate_up.num_bytes, self._down.num_bytes

    @property
    def first_weight(self) -> torch.Tensor | None:
        """What a call reads first, as our matrix kernels take it; None where they don't serve it."""
        return self._parts[0] if self._has_tiles else None

    def __call__(self, rows_TD: torch.Tensor) -> torch.Tensor:
        """[T, D], newly allocated."""
        if not self._has_tiles:
            return self._down(gated(self._gate_up(rows_TD), self._activation))
        out: torch.Tensor = torch.ops.antiphon.gated_half(rows_TD.contiguous(), *self._parts, self._width)
        return out


def _packed(weight: torch.Tensor, *, int8: bool, pairs: bool) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """The weight for our matrix kernels, the scales that int8 has, and the bytes of both."""
    if int8:
        held = TileInt8(weight, pairs=pairs)
        return held.weight, held.scales, held.num_bytes
    return torch.ops.antiphon.pack_weight(weight.contiguous(), pairs), None, weight.nbytes
