"""Triton kernels of decode attention over the paged cache: a row's context in parts, then the parts together (hot).

One program holds some query heads of one KV head against one part of the context; parts are cut by the row's own length, read on
the card, so that nothing here depends on lengths that the host knows. A row's result depends on its own length and on the number
of parts alone. K and V may differ in head dim, and V may be a view of K's cache (latent attention, where all heads share one).

Legend: B rows, N query heads, K KV heads, H head dim of keys, V of values, M blocks of a row's table.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from antiphon.models.cards.tuning import MIN_DOT, RAISE, decode_tiles, power_of_two, split_dims


@triton.jit
def decode_kernel(
    q,
    k,
    v,
    blocks,
    lens,
    part,
    mass,
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
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    RAISE: tl.constexpr,
):
    """The unnormalised sum over one part, [N, part, V] fp32, and the logarithm of its mass, [N, part]."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    piece = tl.program_id(2)
    tiles: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    kv_head = tile // tiles
    member = (tile % tiles) * ROWS + tl.arange(0, ROWS)
    head = kv_head * GROUP + member
    is_head = member < GROUP
    main = tl.arange(0, MAIN)
    out_dim = tl.arange(0, BLOCK_V)

    length = tl.load(lens + row).to(tl.int32)
    first = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    run = tl.cdiv(tl.cdiv(length - first, PARTS), COLUMNS) * COLUMNS
    start = first + piece * run
    end = tl.minimum(start + run, length)

    q_at = q + row * q_row_stride + head[:, None] * q_head_stride
    queries = tl.load(q_at + main[None, :], mask=is_head[:, None] & (main < DIM)[None, :], other=0.0)
    if RAISE:
        queries = queries.to(tl.float32)
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        more = tl.load(q_at + rest[None, :], mask=is_head[:, None] & (rest < DIM)[None, :], other=0.0)
        if RAISE:
            more = more.to(tl.float32)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for at in range(start, end, COLUMNS):
        token = at + tl.arange(0, COLUMNS)
        seen = token < end
        block = tl.load(blocks + row * table_stride + token // SIZE, mask=seen, other=0).to(tl.int64)
        slot = block * SIZE + token % SIZE
        k_at = k + slot[None, :] * k_slot_stride + kv_head * k_head_stride
        keys = tl.load(k_at + main[:, None], mask=seen[None, :] & (main < DIM)[:, None], other=0.0)
        if RAISE:
            keys = keys.to(tl.float32)
        scores = tl.dot(queries, keys, input_precision="ieee")
        if REST > 0:
            tail = MAIN + tl.arange(0, REST)
            keys_rest = tl.load(k_at + tail[:, None], mask=seen[None, :] & (tail < DIM)[:, None], other=0.0)
            if RAISE:
                keys_rest = keys_rest.to(tl.float32)
            scores = tl.dot(more, keys_rest, acc=scores, input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        shares = tl.exp(scores - new_best[:, None])
        kept = tl.exp(best - new_best)
        v_at = v + slot[:, None] * v_slot_stride + kv_head * v_head_stride
        values = tl.load(v_at + out_dim[None, :], mask=seen[:, None] & (out_dim < DIM_V)[None, :], other=0.0)
        rounded = shares.to(v.dtype.element_ty)
        if RAISE:
            rounded = rounded.to(tl.float32)
            values = values.to(tl.float32)
        sums = tl.dot(rounded, values, acc=sums * kept[:, None], input_precision="ieee")
        total = total * kept + tl.sum(shares, 1)
        best = new_best
    place = (row * HEADS + head) * PARTS + piece
    tl.store(part + place[:, None] * DIM_V + out_dim[None, :], sums, mask=is_head[:, None] & (out_dim < DIM_V)[None, :])
    tl.store(mass + place * 2, best, mask=is_head)
    tl.store(mass + place * 2 + 1, total, mask=is_head)


@triton.jit
def combine_kernel(part, mass, out, HEADS: tl.constexpr, DIM_V: tl.constexpr, BLOCK_V: tl.constexpr, PARTS: tl.constexpr):
    """One head of one row: its parts, always added in the same order. A row of no context is 0."""
    place = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    at = tl.arange(0, BLOCK_V)
    inside = at < DIM_V
    best = float("-inf")
    for piece in range(PARTS):
        best = tl.maximum(best, tl.load(mass + (place * PARTS + piece) * 2))
    total = 0.0
    sums = tl.zeros([BLOCK_V], tl.float32)
    for piece in range(PARTS):
        top = tl.load(mass + (place * PARTS + piece) * 2)
        held = tl.load(mass + (place * PARTS + piece) * 2 + 1)
        kept = tl.where(held == 0.0, 0.0, tl.exp(top - best))
        total += kept * held
        sums += kept * tl.load(part + (place * PARTS + piece) * DIM_V + at, mask=inside, other=0.0)
    result = tl.where(total == 0.0, 0.0, sums / total)
    tl.store(out + place * DIM_V + at, result.to(out.dtype.element_ty), mask=inside)


def decode_attention(
    q_BNH: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    blocks_BM: torch.Tensor,
    lens_B: torch.Tensor,
    block_size: int,
    scale: float,
    window: int,
    num_parts: int,
) -> torch.Tensor:
    """[B, N, V]: attention of one token a row over its own ``lens_B`` tokens of context. ``window``: 0 = all of it."""
    num_rows, num_heads, dim = q_BNH.shape
    kv_heads, dim_v = k_cache.shape[1], v_cache.shape[2]
    out = torch.empty((num_rows, num_heads, dim_v), dtype=q_BNH.dtype, device=q_BNH.device)
    if not num_rows:
        return out
    group = num_heads // kv_heads
    tiles = decode_tiles(group, dim, dim_v, q_BNH.element_size())
    main, rest = split_dims(dim)
    block_v = max(MIN_DOT, power_of_two(dim_v))
    part = torch.empty((num_rows, num_heads, num_parts, dim_v), dtype=torch.float32, device=q_BNH.device)
    mass = torch.empty((num_rows, num_heads, num_parts, 2), dtype=torch.float32, device=q_BNH.device)
    kernel: Any = decode_kernel[(num_rows, kv_heads * triton.cdiv(group, tiles.rows), num_parts)]
    kernel(
        *(q_BNH, k_cache, v_cache, blocks_BM, lens_B, part, mass, scale, window),
        *(q_BNH.stride(0), q_BNH.stride(1), k_cache.stride(0), k_cache.stride(1), v_cache.stride(0), v_cache.stride(1)),
        *(blocks_BM.stride(0), num_heads, group, tiles.rows, dim, max(MIN_DOT, main), rest, dim_v, block_v, block_size),
        *(tiles.columns, num_parts, RAISE),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    join: Any = combine_kernel[(num_rows, num_heads)]
    join(part, mass, out, num_heads, dim_v, block_v, num_parts, num_warps=1)
    return out
