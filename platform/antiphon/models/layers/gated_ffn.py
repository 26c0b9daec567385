"""A gated FFN of two linear layers, down(act(gate(x)) * up(x)): one kernel call where the machine has matrix units (hot).

Legend: T rows, D hidden, I intermediate size. Must not know: shards, experts, checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from antiphon.models.config import Activation
from antiphon.models.layers.functional import gated
from antiphon.models.layers.linear import Linear, has_tiles
from antiphon.models.layers.quantized import AnyLinear, Part, TileInt8, join_linear


class GatedFFN:
    """gate and up in one projection, their product, the projection down."""

    def __init__(
        self,
        gate_up: Sequence[Part],
        down: Part,
        activation: Activation,
        *,
        limit: float | None = None,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        int8_gate_up: bool = False,
        int8_down: bool = False,
    ) -> None:
        """``gate_up``: the weights of gate and up, one after the other in one or more parts; ``limit``: see FFNConfig."""
        self._activation = activation
        self._limit = limit
        self._width = down.shape[1]
        plain = [part for part in gate_up if isinstance(part, torch.Tensor) and has_tiles(part)]
        self._has_tiles = activation == "silu" and limit is None and len(plain) == len(gate_up) and isinstance(down, torch.Tensor)
        if self._has_tiles and isinstance(down, torch.Tensor):
            gate_up_2ID = plain[0] if len(plain) == 1 else torch.cat(plain)
            gate_up_packed, gate_up_scales, gate_up_bytes = _packed(gate_up_2ID, int8=int8_gate_up, pairs=True)
            down_packed, down_scales, down_bytes = _packed(down, int8=int8_down, pairs=False)
            self._parts = gate_up_packed, gate_up_scales, gate_up_bias, down_packed, down_scales, down_bias
            self.num_bytes = gate_up_bytes, down_bytes  # of gate and up; of down
        else:
            self._gate_up: AnyLinear = join_linear(gate_up, gate_up_bias, int8=int8_gate_up)
            self._down: AnyLinear = join_linear((down,), down_bias, int8=int8_down)
            self.num_bytes = self._gate_up.num_bytes, self._down.num_bytes

    @property
    def first_weight(self) -> torch.Tensor | None:
        """What a call reads first, as our matrix kernels take it; None where they don't serve it."""
        return self._parts[0] if self._has_tiles else None

    def __call__(self, rows_TD: torch.Tensor) -> torch.Tensor:
        """[T, D], newly allocated."""
        if not self._has_tiles:
            if self._activation == "silu" and self._limit is None and isinstance(self._gate_up, Linear):
                return self._down(self._gate_up.silu_gated(rows_TD))
            return self._down(gated(self._gate_up(rows_TD), self._activation, self._limit))
        out: torch.Tensor = torch.ops.antiphon.gated_half(rows_TD.contiguous(), *self._parts, self._width)
        return out


def _packed(weight: torch.Tensor, *, int8: bool, pairs: bool) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """The weight for our matrix kernels, the scales that int8 has, and the bytes of both."""
    if int8:
        held = TileInt8(weight, pairs=pairs)
        return held.weight, held.scales, held.num_bytes
    return torch.ops.antiphon.pack_weight(weight.contiguous(), pairs), None, weight.nbytes
