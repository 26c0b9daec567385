"""Triton kernel that norms and rotates the heads of q and k and writes k and v into the paged cache, in one pass (hot).

Legend: T rows, N query heads, K KV heads, H head dim, R rotated dims.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from antiphon.models.cards.tuning import power_of_two


@triton.jit
def rope_and_cache_kernel(
    qkv,
    cos,
    sin,
    positions,
    slots,
    k_cache,
    v_cache,
    q_norm,
    k_norm,
    eps,
    qkv_stride,
    k_slot_stride,
    v_slot_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    NORMED: tl.constexpr,
):
    """One head of one row: N queries (rotated in place), then K keys, then K values. A slot below 0 is written nowhere."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    source = qkv + row * qkv_stride + head * DIM
    values = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    slot = tl.load(slots + row).to(tl.int64)
    if head >= HEADS + KV_HEADS:
        target = v_cache + slot * v_slot_stride + (head - HEADS - KV_HEADS) * DIM
        tl.store(target + at, values.to(v_cache.dtype.element_ty), mask=inside & (slot >= 0))
    else:
        # Every dimension is rotated against its partner, HALF further; dimensions beyond the rotated ones have none.
        first = at < HALF
        rotated = at < 2 * HALF
        partner = tl.where(first, at + HALF, at - HALF)
        others = tl.load(source + partner, mask=rotated, other=0.0).to(tl.float32)
        if NORMED:
            rate = 1.0 / tl.sqrt(tl.sum(values * values, 0) / DIM + eps)
            if head < HEADS:
                mine = tl.load(q_norm + at, mask=inside, other=0.0).to(tl.float32)
                theirs = tl.load(q_norm + partner, mask=rotated, other=0.0).to(tl.float32)
            else:
                mine = tl.load(k_norm + at, mask=inside, other=0.0).to(tl.float32)
                theirs = tl.load(k_norm + partner, mask=rotated, other=0.0).to(tl.float32)
            values = (values * rate * mine).to(qkv.dtype.element_ty).to(tl.float32)
            others = (others * rate * theirs).to(qkv.dtype.element_ty).to(tl.float32)
        position = tl.load(positions + row).to(tl.int64)
        angle = position * HALF + tl.where(first, at, at - HALF)
        c = tl.load(cos + angle, mask=rotated, other=1.0)
        s = tl.load(sin + angle, mask=rotated, other=0.0)
        turned = values * c + tl.where(first, -others, others) * s
        if head < HEADS:
            tl.store(source + at, turned.to(qkv.dtype.element_ty), mask=inside)
        else:
            target = k_cache + slot * k_slot_stride + (head - HEADS) * DIM
            tl.store(target + at, turned.to(k_cache.dtype.element_ty), mask=inside & (slot >= 0))


def rope_and_cache(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> None:
    """Norm (where given) and rotate q in place; norm and rotate k and write it and v into the cache at ``slots_T``."""
    _, kv_heads, dim = k_cache.shape
    if not qkv.shape[0]:
        return
    normed = q_norm is not None and k_norm is not None
    kernel: Any = rope_and_cache_kernel[(qkv.shape[0], num_heads + 2 * kv_heads)]
    kernel(
        *(qkv, cos, sin, positions_T, slots_T, k_cache, v_cache, q_norm if normed else cos, k_norm if normed else cos, eps),
        *(qkv.stride(0), k_cache.stride(0), v_cache.stride(0)),
        *(num_heads, kv_heads, dim, power_of_two(dim), cos.shape[1], normed),
        num_warps=1,
    )
