"""Linear layers with weights packed once for the machine that runs them (hot).

On CPUs with oneDNN the weight is reordered at load into the layout its matrix kernels want, which is worth 1.1-2 x at decode's
batch sizes; elsewhere the plain operator runs. Legend: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# The row count that oneDNN packs for: decode batches. Other counts run on the same packed weight.
PACK_ROWS = 32


class Linear:
    """x_TI @ weight_OI^T + bias_O, its weight packed at construction."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> None:
        self.in_features = weight_OI.shape[1]
        self.out_features = weight_OI.shape[0]
        self.num_bytes = weight_OI.numel() * weight_OI.element_size()
        self._bias = bias_O
        self._packed = _can_pack(weight_OI)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI, PACK_ROWS) if self._packed else weight_OI

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, O], newly allocated."""
        if self._packed:
            result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self._weight, self._bias, "none", [], "")
            return result
        return F.linear(x_TI, self._weight, self._bias)


def _can_pack(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and (weight.dtype is torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
