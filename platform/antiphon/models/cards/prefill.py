"""Triton kernel of chunked prefill attention over the paged cache (hot).

Chunks are packed rows of one step; where each begins, how many rows it has and how much context came before it are read on the
card. Legend: T rows, N query heads, K KV heads, H head dim, C chunks, M blocks of a chunk's table.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from antiphon.models.cards.tuning import MIN_DOT, RAISE, power_of_two, prefill_tiles


@triton.jit
def prefill_kernel(
    q,
    k,
    v,
    blocks,
    first_rows,
    num_rows,
    num_past,
    out,
    scale,
    window,
    q_row_stride,
    q_head_stride,
    k_slot_stride,
    k_head_stride,
    v_slot_stride,
    v_head_stride,
    table_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    RAISE: tl.constexpr,
):
    """ROWS rows of one chunk, one query head."""
    chunk = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    kv_head = head // GROUP
    rows = tl.load(num_rows + chunk).to(tl.int32)
    past = tl.load(num_past + chunk).to(tl.int32)
    begin = tl.program_id(0) * ROWS
    if begin < rows:
        mine = begin + tl.arange(0, ROWS)
        is_row = mine < rows
        row = tl.load(first_rows + chunk).to(tl.int64) + mine
        dim = tl.arange(0, BLOCK_K)
        out_dim = tl.arange(0, BLOCK_V)
        q_at = q + row[:, None] * q_row_stride + head * q_head_stride
        queries = tl.load(q_at + dim[None, :], mask=is_row[:, None] & (dim < DIM)[None, :], other=0.0)
        if RAISE:
            queries = queries.to(tl.float32)
        place = past + mine  # of each row in its own context
        best = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, BLOCK_V], tl.float32)
        end = past + tl.minimum(begin + ROWS, rows)
        first = tl.where(window > 0, tl.maximum(past + begin - window + 1, 0) // COLUMNS * COLUMNS, 0)
        for at in range(first, end, COLUMNS):
            token = at + tl.arange(0, COLUMNS)
            there = token < end
            block = tl.load(blocks + chunk * table_stride + token // SIZE, mask=there, other=0).to(tl.int64)
            slot = block * SIZE + token % SIZE
            k_at = k + slot[None, :] * k_slot_stride + kv_head * k_head_stride
            keys = tl.load(k_at + dim[:, None], mask=there[None, :] & (dim < DIM)[:, None], other=0.0)
            if RAISE:
                keys = keys.to(tl.float32)
            scores = tl.dot(queries, keys, input_precision="ieee") * scale
            seen = token[None, :] <= place[:, None]
            seen = seen & ((window == 0) | (token[None, :] > place[:, None] - window))
            scores = tl.where(seen, scores, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, 1))
            # A row that has seen nothing yet (its window begins later) keeps a mass of 0 rather than of exp(inf - inf).
            anchor = tl.where(new_best == float("-inf"), 0.0, new_best)
            shares = tl.exp(scores - anchor[:, None])
            kept = tl.exp(best - anchor)
            v_at = v + slot[:, None] * v_slot_stride + kv_head * v_head_stride
            values = tl.load(v_at + out_dim[None, :], mask=there[:, None] & (out_dim < DIM_V)[None, :], other=0.0)
            rounded = shares.to(v.dtype.element_ty)
            if RAISE:
                rounded = rounded.to(tl.float32)
                values = values.to(tl.float32)
            sums = tl.dot(rounded, values, acc=sums * kept[:, None], input_precision="ieee")
            total = total * kept + tl.sum(shares, 1)
            best = new_best
        out_at = out + (row[:, None] * HEADS + head) * DIM_V + out_dim[None, :]
        tl.store(out_at, (sums / total[:, None]).to(out.dtype.element_ty), mask=is_row[:, None] & (out_dim < DIM_V)[None, :])


def prefill_attention(
    q_TNH: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    blocks_CM: torch.Tensor,
    first_rows_C: torch.Tensor,
    num_rows_C: torch.Tensor,
    num_past_C: torch.Tensor,
    max_rows: int,
    block_size: int,
    scale: float,
    window: int,
) -> torch.Tensor:
    """[T, N, V]: causal attention of every chunk's rows over its context; rows of no chunk are 0.

    ``max_rows``: no chunk has more; ``window``: 0 = all of the context.
    """
    num_heads, dim = q_TNH.shape[1:]
    dim_v = v_cache.shape[2]
    out = torch.zeros((q_TNH.shape[0], num_heads, dim_v), dtype=q_TNH.dtype, device=q_TNH.device)
    num_chunks = blocks_CM.shape[0]
    if not num_chunks or not max_rows:
        return out
    tiles = prefill_tiles(dim, dim_v, q_TNH.element_size())
    kernel: Any = prefill_kernel[(triton.cdiv(max_rows, tiles.rows), num_heads, num_chunks)]
    kernel(
        *(q_TNH, k_cache, v_cache, blocks_CM, first_rows_C, num_rows_C, num_past_C, out, scale, window),
        *(q_TNH.stride(0), q_TNH.stride(1), k_cache.stride(0), k_cache.stride(1), v_cache.stride(0), v_cache.stride(1)),
        *(blocks_CM.stride(0), num_heads, num_heads // k_cache.shape[1], tiles.rows, dim, max(MIN_DOT, power_of_two(dim))),
        *(dim_v, max(MIN_DOT, power_of_two(dim_v)), block_size, tiles.columns, RAISE),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out
