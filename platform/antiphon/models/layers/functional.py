"""Norms, rotary embedding and activations (hot).

Legend: T tokens, D hidden, N heads, H head dim, R rotary dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from antiphon.device.device import is_card
from antiphon.models.cards import kernels
from antiphon.models.config import Activation, NormKind
from antiphon.models.layers.rope_config import RopeConfig
from antiphon.models.loading.weights import Weights
from antiphon.models.native.library import available


def advance(x_TD: torch.Tensor, y_TD: torch.Tensor) -> torch.Tensor:
    """x += y, in place; on a processor without waking torch's threads beside those of the kernels."""
    if x_TD.device.type == "cpu" and available() and _are_alike(x_TD, y_TD) and x_TD.dtype in (torch.bfloat16, torch.float32):
        torch.ops.antiphon.add_rows(x_TD, y_TD)
        return x_TD
    return x_TD.add_(y_TD)


def _are_alike(x_TD: torch.Tensor, y_TD: torch.Tensor) -> bool:
    return x_TD.dtype == y_TD.dtype and x_TD.shape == y_TD.shape and x_TD.is_contiguous() and y_TD.is_contiguous()


class RMSNorm:
    """Root mean square norm (arXiv 1910.07467) over the last dimension; statistics in fp32."""

    def __init__(self, weight_D: torch.Tensor, eps: float) -> None:
        self.weight_D = weight_D
        self._shape = (weight_D.shape[0],)
        self._eps = self.eps = eps
        self._native = weight_D.device.type == "cpu" and weight_D.is_contiguous() and available()
        self._card = kernels() if is_card(weight_D.device) else None

    def after_adding(self, x_TD: torch.Tensor, y_TD: torch.Tensor) -> torch.Tensor:
        """The norm of x += y, in one kernel where there is one."""
        out: torch.Tensor
        if self._card is not None:
            out = self._card.add_norm(x_TD, y_TD, self.weight_D, self._eps)
        elif self._native and self.weight_D.dtype in (x_TD.dtype, torch.float32) and _are_alike(x_TD, y_TD):
            out = torch.ops.antiphon.add_rms_norm(x_TD, y_TD, self.weight_D, self._eps, 0.0)
        else:
            return self(advance(x_TD, y_TD))
        return out

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as x."""
        if self._native and self.weight_D.dtype in (x.dtype, torch.float32) and x.is_contiguous():
            out: torch.Tensor = torch.ops.antiphon.rms_norm(x, self.weight_D, self._eps, 0.0)
            return out
        if self._card is not None:
            normed: torch.Tensor = self._card.norm(x, self.weight_D, self._eps)
            return normed
        if self.weight_D.dtype is not x.dtype:  # a weight of more precision than the rows: round once, at the end
            return F.rms_norm(x.to(self.weight_D.dtype), self._shape, self.weight_D, self._eps).to(x.dtype)
        return F.rms_norm(x, self._shape, self.weight_D, self._eps)


class LayerNorm:
    """Mean and variance norm with weight and bias (arXiv 1607.06450) over the last dimension; statistics in fp32."""

    def __init__(self, weight_D: torch.Tensor, bias_D: torch.Tensor, eps: float) -> None:
        self._weight = weight_D
        self._bias = bias_D
        self._shape = (weight_D.shape[0],)
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as x."""
        return F.layer_norm(x, self._shape, self._weight, self._bias, self._eps)


Norm = RMSNorm | LayerNorm


def read_norm(kind: NormKind, weights: Weights, name: str, eps: float) -> Norm:
    """The norm whose tensors begin with ``name``. Raises CheckpointInvalid."""
    if kind == "layer":
        return LayerNorm(weights.read(name + ".weight"), weights.read(name + ".bias"), eps)
    if kind == "rms_plus_one":
        return RMSNorm(weights.read(name + ".weight", dtype=torch.float32) + 1.0, eps)
    return RMSNorm(weights.read(name + ".weight"), eps)


class Rope:
    """Rotary position embedding (arXiv 2104.09864), halves rotated against each other as Hugging Face checkpoints expect."""

    def __init__(self, config: RopeConfig, max_position: int, dtype: torch.dtype, device: torch.device) -> None:
        inv_freq = torch.tensor(config.inv_freq, dtype=torch.float32, device=device)
        angles = torch.outer(torch.arange(max_position, dtype=torch.float32, device=device), inv_freq)
        self.cos = angles.cos() * config.attention_factor  # fp32 [max_position, R/2]
        self.sin = angles.sin() * config.attention_factor
        self._cos, self._sin = self.cos.to(dtype), self.sin.to(dtype)
        self._half = len(config.inv_freq)
        self.rotary_dim = config.rotary_dim

    def tables(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin, each [T, 1, R/2], for one step; every layer of the step reuses them."""
        cos, sin = self._cos.index_select(0, positions_T), self._sin.index_select(0, positions_T)
        return cos.unsqueeze(1), sin.unsqueeze(1)

    def rotate(self, x_TNH: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Rotate the leading R dimensions of each head."""
        cos, sin = tables
        first, second = x_TNH[..., : self._half], x_TNH[..., self._half : 2 * self._half]
        rotated = [first * cos - second * sin, second * cos + first * sin]
        if x_TNH.shape[-1] > 2 * self._half:
            rotated.append(x_TNH[..., 2 * self._half :])
        return torch.cat(rotated, dim=-1)


def gated(gate_up_TI: torch.Tensor, activation: Activation, limit: float | None = None) -> torch.Tensor:
    """act(gate) * up, from both side by side: [T, 2I] -> [T, I]. ``limit``: see FFNConfig."""
    if activation == "gpt_oss" or limit is not None:
        return _bounded(gate_up_TI, activation, limit)
    if activation == "silu" and gate_up_TI.is_contiguous() and gate_up_TI.device.type == "cpu" and available():
        out: torch.Tensor = torch.ops.antiphon.silu_mul(gate_up_TI)
        return out
    if is_card(gate_up_TI.device):
        acted: torch.Tensor = kernels().gated(gate_up_TI, activation)
        return acted
    gate, up = gate_up_TI.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate).mul_(up)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none").mul_(up)


def _bounded(gate_up_TI: torch.Tensor, activation: Activation, limit: float | None) -> torch.Tensor:
    gate, up = gate_up_TI.chunk(2, dim=-1)
    if activation == "gpt_oss":
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return torch.sigmoid(gate * 1.702).mul_(gate).mul_(up + 1.0)
    acted = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    return acted if limit is None else acted.clamp_(max=limit).mul_(up.clamp(-limit, limit))
