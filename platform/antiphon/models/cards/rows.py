"""Triton kernels over single rows: norm, residual add with norm, gated activation (hot).

Every number is raised to fp32 once read and rounded once when written. Legend: T rows, D hidden, I intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from antiphon.models.cards.tuning import power_of_two

_COLUMNS = 1024  # of one program of the activation
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit
def norm_kernel(x, y, weight, out, x_stride, y_stride, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """One row: x += y where ADD, out = norm(x)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    values = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(y + row * y_stride + at, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(x.dtype.element_ty)
        tl.store(x + row * x_stride + at, rounded, mask=inside)
        values = rounded.to(tl.float32)
    mean = tl.sum(values * values, 0) / WIDTH
    scaled = values * (1.0 / tl.sqrt(mean + eps)) * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + at, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def activate(gate, KIND: tl.constexpr):
    """silu, gelu, or gelu by tanh, of fp32."""
    if KIND == 0:
        return gate * tl.sigmoid(gate)
    if KIND == 1:
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate * tl.sigmoid(2.0 * inner)  # 0.5 (1 + tanh z) is sigmoid(2 z)


@triton.jit
def gated_kernel(gate_up, out, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """One run of a row: act(gate) * up. The activation is rounded before the product, as torch's two operators do."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    gate = tl.load(gate_up + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    acted = activate(gate, KIND).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + at, (acted * up).to(out.dtype.element_ty), mask=inside)


def norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, newly allocated."""
    flat = x_TD.reshape(-1, x_TD.shape[-1])
    out = torch.empty_like(flat, memory_format=torch.contiguous_format)
    _launch_norm(flat, flat, weight_D, out, eps, add=False)
    return out.view(x_TD.shape)


def add_norm(x_TD: torch.Tensor, y_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x += y in place; its RMSNorm, newly allocated."""
    out = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    _launch_norm(x_TD, y_TD, weight_D, out, eps, add=True)
    return out


def _launch_norm(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float, *, add: bool) -> None:
    num_rows, width = x.shape
    if num_rows:
        block = power_of_two(width)
        kernel: Any = norm_kernel[(num_rows,)]
        kernel(x, y, weight, out, x.stride(0), y.stride(0), eps, width, block, add, num_warps=8 if block >= 4096 else 4)


def gated(gate_up_TI: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up, from both side by side: [T, 2I] -> [T, I]."""
    num_rows, width = gate_up_TI.shape[0], gate_up_TI.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up_TI.dtype, device=gate_up_TI.device)
    if num_rows:
        block = min(_COLUMNS, power_of_two(width))
        kernel: Any = gated_kernel[(num_rows, triton.cdiv(width, block))]
        kernel(gate_up_TI, out, gate_up_TI.stride(0), width, block, _ACTIVATIONS[activation], num_warps=4)
    return out
