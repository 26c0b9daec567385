"""Triton kernels of a layer's experts: grouped products over rows sorted by expert, without asking the host (hot).

    pairs (row, expert) ──sorted by slot──► tiles of one expert each ──gate·up──► h ──down──► a result per pair ──► sum by weight

Experts lie in an arena of slots, and ``slot_of_id`` says where each one is (-1: not held here): experts can come and go between two
launches, and a captured launch follows. The grid has room for the worst case and programs beyond the tiles in use end at once.

Legend: T rows, D hidden, I intermediate size, K ids per row, M = T·K pairs, S slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from antiphon.models.cards.rows import _ACTIVATIONS, activate
from antiphon.models.cards.tuning import RAISE, expert_tiles, power_of_two

_SUM_COLUMNS = 1024


@triton.jit
def up_kernel(
    rows,
    gate_up,
    h,
    order,
    slot_of_tile,
    begin_of_tile,
    end_of_slot,
    row_stride,
    IDS: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    KIND: tl.constexpr,
    RAISE: tl.constexpr,
):
    """h = act(gate(x)) * up(x) of one tile of pairs, in sorted order."""
    tile = tl.program_id(0)
    slot = tl.load(slot_of_tile + tile).to(tl.int64)
    if slot >= 0:
        at = tl.load(begin_of_tile + tile) + tl.arange(0, ROWS)
        is_pair = at < tl.load(end_of_slot + slot)
        row = tl.load(order + at, mask=is_pair, other=0) // IDS
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        is_column = column < WIDTH
        base = gate_up + slot * (2 * WIDTH * HIDDEN)
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for depth in range(0, HIDDEN, DEPTH):
            d = depth + tl.arange(0, DEPTH)
            deep = d < HIDDEN
            x = tl.load(rows + row[:, None] * row_stride + d[None, :], mask=is_pair[:, None] & deep[None, :], other=0.0)
            inside = deep[:, None] & is_column[None, :]
            w = tl.load(base + column[None, :].to(tl.int64) * HIDDEN + d[:, None], mask=inside, other=0.0)
            u = tl.load(base + (WIDTH + column[None, :]).to(tl.int64) * HIDDEN + d[:, None], mask=inside, other=0.0)
            if RAISE:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
                u = u.to(tl.float32)
            gate = tl.dot(x, w, acc=gate, input_precision="ieee")
            up = tl.dot(x, u, acc=up, input_precision="ieee")
        dtype = h.dtype.element_ty
        acted = activate(gate.to(dtype).to(tl.float32), KIND).to(dtype).to(tl.float32)
        result = acted * up.to(dtype).to(tl.float32)
        target = h + at[:, None].to(tl.int64) * WIDTH + column[None, :]
        tl.store(target, result.to(dtype), mask=is_pair[:, None] & is_column[None, :])


@triton.jit
def down_kernel(
    h,
    down,
    results,
    order,
    slot_of_tile,
    begin_of_tile,
    end_of_slot,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    RAISE: tl.constexpr,
):
    """Each pair's result, at the pair's own place."""
    tile = tl.program_id(0)
    slot = tl.load(slot_of_tile + tile).to(tl.int64)
    if slot >= 0:
        at = tl.load(begin_of_tile + tile) + tl.arange(0, ROWS)
        is_pair = at < tl.load(end_of_slot + slot)
        pair = tl.load(order + at, mask=is_pair, other=0)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        is_column = column < HIDDEN
        base = down + slot * (WIDTH * HIDDEN)
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for depth in range(0, WIDTH, DEPTH):
            d = depth + tl.arange(0, DEPTH)
            deep = d < WIDTH
            x = tl.load(h + at[:, None].to(tl.int64) * WIDTH + d[None, :], mask=is_pair[:, None] & deep[None, :], other=0.0)
            w = tl.load(
                base + column[None, :].to(tl.int64) * WIDTH + d[:, None], mask=deep[:, None] & is_column[None, :], other=0.0
            )
            if RAISE:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            sums = tl.dot(x, w, acc=sums, input_precision="ieee")
        target = results + pair[:, None].to(tl.int64) * HIDDEN + column[None, :]
        tl.store(target, sums.to(results.dtype.element_ty), mask=is_pair[:, None] & is_column[None, :])


@triton.jit
def sum_kernel(results, ids, slot_of_id, weights, out, IDS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """One run of a row: its results by weight, in the order of its ids. Places without an expert are not read."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < HIDDEN
    sums = tl.zeros([BLOCK], tl.float32)
    for k in range(IDS):
        chosen = tl.load(ids + row * IDS + k)
        held = tl.load(slot_of_id + tl.maximum(chosen, 0)) >= 0
        takes = (chosen >= 0) & held
        weight = tl.load(weights + row * IDS + k, mask=takes, other=0.0).to(tl.float32)
        weight = weight.to(out.dtype.element_ty).to(tl.float32)
        result = tl.load(results + (row * IDS + k) * HIDDEN + at, mask=inside & takes, other=0.0).to(tl.float32)
        sums += tl.where(takes, weight * result, 0.0)
    tl.store(out + row * HIDDEN + at, sums.to(out.dtype.element_ty), mask=inside)


class Plan(NamedTuple):
    """Which pairs go together, all of it on the card."""

    order_M: torch.Tensor  # pairs by slot, int64; those without a slot last
    slot_of_tile: torch.Tensor  # int32, -1 = no tile
    begin_of_tile: torch.Tensor  # first pair in sorted order, int64
    end_of_slot: torch.Tensor  # one past the slot's last pair, int64
    num_missing: torch.Tensor  # int64 []: pairs whose expert is not held here


def plan_tiles(ids_TK: torch.Tensor, slot_of_id: torch.Tensor, num_slots: int, rows_per_tile: int) -> Plan:
    """Cut the sorted pairs into tiles of one expert each; shapes follow from shapes alone."""
    device = ids_TK.device
    ids_M = ids_TK.reshape(-1)
    num_pairs = ids_M.numel()
    slots_M = slot_of_id.index_select(0, ids_M.clamp(min=0)).long()
    absent_M = ids_M < 0
    num_missing = ((slots_M < 0) & ~absent_M).sum()
    slots_M = torch.where(absent_M | (slots_M < 0), num_slots, slots_M)
    order_M = torch.argsort(slots_M, stable=True)
    ones = torch.ones(num_pairs, dtype=torch.int64, device=device)
    counts = torch.zeros(num_slots + 1, dtype=torch.int64, device=device).scatter_add_(0, slots_M, ones)[:num_slots]
    end_of_slot = counts.cumsum(0)
    tiles_S = (counts + rows_per_tile - 1) // rows_per_tile
    last_tile_S = tiles_S.cumsum(0)
    num_tiles = max(1, min(num_pairs, -(-num_pairs // rows_per_tile) + num_slots))
    tile = torch.arange(num_tiles, device=device)
    slot = torch.searchsorted(last_tile_S, tile, right=True)
    known = slot.clamp(max=num_slots - 1)
    begin = (end_of_slot - counts)[known] + (tile - (last_tile_S - tiles_S)[known]) * rows_per_tile
    slot_of_tile = torch.where(slot < num_slots, slot, -1).to(torch.int32)
    return Plan(order_M, slot_of_tile, begin, end_of_slot, num_missing)


def experts(
    rows_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up_SID: torch.Tensor,
    down_SDI: torch.Tensor,
    slot_of_id: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of each row's experts, [T, D], and how many pairs asked for an expert that is not held, int64 [].

    Ids of -1 add nothing.
    """
    num_rows, num_ids = ids_TK.shape
    num_slots, width, hidden = gate_up_SID.shape[0], gate_up_SID.shape[1] // 2, gate_up_SID.shape[2]
    out = torch.empty_like(rows_TD, memory_format=torch.contiguous_format)
    if not num_rows:
        return out, torch.zeros((), dtype=torch.int64, device=rows_TD.device)
    num_pairs = num_rows * num_ids
    tiles = expert_tiles(num_pairs, num_slots, rows_TD.element_size())
    plan = plan_tiles(ids_TK, slot_of_id, num_slots, tiles.rows)
    h = torch.empty((num_pairs, width), dtype=rows_TD.dtype, device=rows_TD.device)
    results = torch.empty((num_pairs, hidden), dtype=rows_TD.dtype, device=rows_TD.device)
    num_tiles = plan.slot_of_tile.shape[0]
    where = plan.order_M, plan.slot_of_tile, plan.begin_of_tile, plan.end_of_slot
    up: Any = up_kernel[(num_tiles, triton.cdiv(width, tiles.columns))]
    up(
        *(rows_TD, gate_up_SID, h, *where, rows_TD.stride(0), num_ids, hidden, width),
        *(tiles.rows, tiles.columns, tiles.depth, _ACTIVATIONS[activation], RAISE),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    down: Any = down_kernel[(num_tiles, triton.cdiv(hidden, tiles.columns))]
    down(
        *(h, down_SDI, results, *where, hidden, width, tiles.rows, tiles.columns, tiles.depth, RAISE),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    block = min(_SUM_COLUMNS, power_of_two(hidden))
    add: Any = sum_kernel[(num_rows, triton.cdiv(hidden, block))]
    add(results, ids_TK.contiguous(), slot_of_id, weights_TK.contiguous(), out, num_ids, hidden, block, num_warps=4)
    return out, plan.num_missing
