"""A causal convolution over a sequence whose last inputs are its state (hot).

Legend: T rows, C channels, W taps, B decoding requests. Must not know: what is convolved.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from antiphon.core.errors import UnsupportedModel
from antiphon.device.device import is_card
from antiphon.models.attention.delta_rule import causal_conv
from antiphon.models.attention.states import StateBatch
from antiphon.models.loading.weights import Weights
from antiphon.models.native.library import available


class CausalConv:
    """One filter of W taps per channel; the W - 1 inputs before a row are in a plane [slots, W - 1, C]."""

    def __init__(self, weight_C1W: torch.Tensor, bias_C: torch.Tensor | None = None, *, silu: bool = False) -> None:
        """``silu``: applied to what comes out."""
        if is_card(weight_C1W.device):
            raise UnsupportedModel("layers with a state per sequence are not computed on a card yet", "layer_types")
        self._weight_WC = weight_C1W[:, 0].t().float().contiguous()
        self._bias = None if bias_C is None else bias_C.float()
        self._silu = silu
        self._native = self._weight_WC.shape[0] > 1 and self._weight_WC.device.type == "cpu" and available()

    @classmethod
    def read(cls, weights: Weights, name: str, *, bias: bool, silu: bool) -> CausalConv:
        """The filter whose tensors begin with ``name``. Raises CheckpointInvalid."""
        weight = weights.read(name + ".weight", dtype=torch.float32)
        return cls(weight, weights.read(name + ".bias", dtype=torch.float32) if bias else None, silu=silu)

    def __call__(self, x_TC: torch.Tensor, tails: torch.Tensor, states: StateBatch) -> torch.Tensor:
        """fp32 [T, C]; the rows' last inputs are in ``tails`` afterwards, where ``states`` says."""
        if self._native and x_TC.stride(1) == 1 and x_TC.dtype in (torch.float32, torch.bfloat16):
            out: torch.Tensor = torch.ops.antiphon.causal_conv(
                *(x_TC, self._weight_WC, self._bias, tails, states.read_B, states.write_B, states.chunk_numbers, self._silu)
            )
            return out
        parts = []
        num_decodes, num_tail = states.num_decodes, self._weight_WC.shape[0] - 1
        if num_decodes:
            window_BWC = torch.cat((tails.index_select(0, states.read_B), x_TC[:num_decodes, None]), dim=1)
            tails.index_copy_(0, states.write_B, window_BWC[:, 1:])
            out_BC = (window_BWC.float() * self._weight_WC).sum(1)
            parts.append(out_BC if self._bias is None else out_BC.add_(self._bias))
        for chunk in states.chunks:
            window_TC = torch.cat((tails[chunk.read], x_TC[chunk.first_row : chunk.first_row + chunk.num_rows]))
            tails[chunk.write].copy_(window_TC[window_TC.shape[0] - num_tail :])
            parts.append(causal_conv(window_TC, self._weight_WC, self._bias))
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return F.silu(whole) if self._silu else whole
