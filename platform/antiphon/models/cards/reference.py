"""The cards' ops in plain torch: what their kernels are compared with, and what serves the ops on a CPU (hot where it serves).

Shapes follow from shapes alone, and nothing asks the host for a value. Legend: as in each kernel's module.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """See ``rows.norm``."""
    values = x_TD.float()
    return (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * weight_D.float()).to(x_TD.dtype)


def add_norm(x_TD: torch.Tensor, y_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """See ``rows.add_norm``."""
    return norm(x_TD.add_(y_TD), weight_D, eps)


def gated(gate_up_TI: torch.Tensor, activation: str) -> torch.Tensor:
    """See ``rows.gated``."""
    gate, up = gate_up_TI.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


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
    """See ``rope.rope_and_cache``; slots are none below 0 here."""
    kv_heads, dim = k_cache.shape[1:]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * kv_heads, dim)
    c, s = cos.index_select(0, positions_T).unsqueeze(1), sin.index_select(0, positions_T).unsqueeze(1)
    half = cos.shape[1]

    def turned(x_TNH: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        if weight is not None:
            x_TNH = norm(x_TNH, weight, eps)
        x_TNH = x_TNH.float()
        first, second = x_TNH[..., :half], x_TNH[..., half : 2 * half]
        parts = [first * c - second * s, second * c + first * s, x_TNH[..., 2 * half :]]
        return torch.cat(parts, dim=-1).to(qkv.dtype)

    keys = turned(heads[:, num_heads : num_heads + kv_heads], k_norm)
    k_cache.index_copy_(0, slots_T, keys.to(k_cache.dtype))
    v_cache.index_copy_(0, slots_T, heads[:, num_heads + kv_heads :].to(v_cache.dtype))
    heads[:, :num_heads] = turned(heads[:, :num_heads], q_norm)


def _attend(
    q_TNH: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots_TC: torch.Tensor, seen_TC: torch.Tensor, scale: float
) -> torch.Tensor:
    num_rows, num_heads, dim = q_TNH.shape
    kv_heads = k_cache.shape[1]
    flat = slots_TC.reshape(-1)
    k = k_cache.index_select(0, flat).view(*slots_TC.shape, kv_heads, dim).float()
    v = v_cache.index_select(0, flat).view(*slots_TC.shape, kv_heads, -1).float()
    q = q_TNH.reshape(num_rows, kv_heads, num_heads // kv_heads, dim).float()
    scores = torch.einsum("tkgh,tckh->tkgc", q, k) * scale
    scores = scores.masked_fill(~seen_TC[:, None, None, :], float("-inf"))
    v = v.masked_fill(~seen_TC[:, :, None, None], 0.0)  # others' blocks may hold NaN, and 0 x NaN would reach the result
    out = torch.einsum("tkgc,tckv->tkgv", torch.softmax(scores, dim=-1), v)
    out = torch.where(seen_TC.any(1)[:, None, None, None], out, 0.0)
    return out.reshape(num_rows, num_heads, -1).to(q_TNH.dtype)


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
    """See ``decode.decode_attention``; every part of the table is read, as a capture needs."""
    token = torch.arange(blocks_BM.shape[1] * block_size, device=q_BNH.device)
    slots = (blocks_BM.long()[:, :, None] * block_size + torch.arange(block_size, device=q_BNH.device)).flatten(1)
    seen = token < lens_B[:, None]
    if window > 0:
        seen = seen & (token >= lens_B[:, None] - window)
    return _attend(q_BNH, k_cache, v_cache, slots, seen, scale)


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
    """See ``prefill.prefill_attention``."""
    row = torch.arange(q_TNH.shape[0], device=q_TNH.device)
    is_mine = (row >= first_rows_C[:, None]) & (row < (first_rows_C + num_rows_C)[:, None])  # [C, T]
    chunk = is_mine.int().argmax(0)
    place = num_past_C.index_select(0, chunk) + row - first_rows_C.index_select(0, chunk)
    token = torch.arange(blocks_CM.shape[1] * block_size, device=q_TNH.device)
    slots = (blocks_CM.long()[:, :, None] * block_size + torch.arange(block_size, device=q_TNH.device)).flatten(1)
    seen = (token <= place[:, None]) & is_mine.any(0)[:, None]
    if window > 0:
        seen = seen & (token > place[:, None] - window)
    return _attend(q_TNH, k_cache, v_cache, slots.index_select(0, chunk), seen, scale)


def experts(
    rows_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up_SID: torch.Tensor,
    down_SDI: torch.Tensor,
    slot_of_id: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``experts.experts``: every row through every expert, which costs what it says and asks nobody."""
    num_slots = gate_up_SID.shape[0]
    slots_TK = slot_of_id.index_select(0, ids_TK.reshape(-1).clamp(min=0)).view(ids_TK.shape).long()
    is_missing = (slots_TK < 0) & (ids_TK >= 0)
    takes = (slots_TK >= 0) & (ids_TK >= 0)
    share = torch.where(takes, weights_TK.float(), 0.0).to(rows_TD.dtype).float()
    by_slot = torch.zeros((rows_TD.shape[0], num_slots), dtype=torch.float32, device=rows_TD.device)
    by_slot.scatter_add_(1, slots_TK.clamp(min=0), share)
    chosen = torch.zeros_like(by_slot).scatter_add_(1, slots_TK.clamp(min=0), takes.float()) > 0
    out = torch.zeros(rows_TD.shape, dtype=torch.float32, device=rows_TD.device)
    for slot in range(num_slots):
        result = F.linear(gated(F.linear(rows_TD, gate_up_SID[slot]), activation), down_SDI[slot]).float()
        out += torch.where(chosen[:, slot, None], by_slot[:, slot, None] * result, 0.0)
    return out.to(rows_TD.dtype), is_missing.sum()


def gate(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    top_k: int,
    sigmoid: bool,
    renormalise: bool,
    scale: float,
    num_groups: int,
    num_kept: int,
    counted: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``gate.gate``. Stable sorts stand for top-k, so that of equals the lowest id wins."""
    num_rows, num_experts = logits_TE.shape
    is_bad = ~torch.isfinite(logits_TE).all(1)
    logits_TE = torch.where(is_bad[:, None], 0.0, logits_TE.float())
    scores = torch.sigmoid(logits_TE) if sigmoid else torch.softmax(logits_TE, dim=-1)
    ranks = scores if bias_E is None else scores + bias_E.float()
    if counted:
        by_group = ranks.view(num_rows, num_groups, -1)
        top = by_group.sort(dim=-1, descending=True).values[..., :counted].sum(-1)
        kept = top.sort(dim=-1, descending=True, stable=True).indices[:, :num_kept]
        outside = torch.ones_like(top, dtype=torch.bool).scatter_(1, kept, False)
        ranks = by_group.masked_fill(outside[..., None], float("-inf")).reshape(num_rows, num_experts)
    ids = ranks.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * scale
    ids = torch.where(is_bad[:, None], -1, ids)
    return ids, torch.where(is_bad[:, None], 0.0, weights), is_bad.int()
