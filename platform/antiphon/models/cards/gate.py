"""Triton kernel of a mixture's gate: scores, the best of all or of the best groups, weights, in one pass over a row (hot).

Of equal scores the lowest id wins. A row with a logit that is NaN or infinite takes no expert and is marked.
Legend: T rows, E experts, K chosen per row, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from antiphon.models.cards.tuning import power_of_two


@triton.jit
def gate_kernel(
    logits,
    bias,
    ids,
    weights,
    bad,
    stride,
    scale,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    BIASED: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row. COUNTED: how many of a group's best make its score, 0 = no groups."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < EXPERTS
    given = tl.load(logits + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    is_bad = tl.sum(((given != given) | (tl.abs(given) == float("inf"))).to(tl.int32), 0) > 0
    given = tl.where(is_bad, 0.0, given)
    if SIGMOID:
        scores = tl.sigmoid(given)
    else:
        raised = tl.exp(tl.where(inside, given, float("-inf")) - tl.max(tl.where(inside, given, float("-inf")), 0))
        scores = raised / tl.sum(raised, 0)
    ranks = scores
    if BIASED:
        ranks += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    ranks = tl.where(inside, ranks, float("-inf"))
    if COUNTED > 0:
        size: tl.constexpr = EXPERTS // GROUPS
        group = at // size
        # A group's rank is worked out where its experts stand, so that no reshaping of odd sizes is needed.
        of_group = tl.full([BLOCK], float("-inf"), tl.float32)
        for g in range(GROUPS):
            members = tl.where((group == g) & inside, ranks, float("-inf"))
            top = tl.max(members, 0)
            if COUNTED > 1:
                leader = tl.min(tl.where(members == top, at, BLOCK), 0)
                top += tl.max(tl.where(at == leader, float("-inf"), members), 0)
            of_group = tl.where(group == g, top, of_group)
        kept = tl.zeros([BLOCK], tl.int32)
        for _ in range(KEPT):
            left = tl.where((kept == 0) & inside, of_group, float("-inf"))
            leader = tl.min(tl.where((left == tl.max(left, 0)) & (kept == 0) & inside, group, GROUPS), 0)
            kept = tl.where(group == leader, 1, kept)
        ranks = tl.where(kept == 1, ranks, float("-inf"))
    slot = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    shares = tl.zeros([BLOCK_K], tl.float32)
    taken = tl.where(inside, 0, 1)
    for k in range(K):
        left = tl.where(taken == 0, ranks, float("-inf"))
        best = tl.min(tl.where((left == tl.max(left, 0)) & (taken == 0), at, BLOCK), 0)
        taken = tl.where(at == best, 1, taken)
        chosen = tl.where(slot == k, best, chosen)
        shares = tl.where(slot == k, tl.sum(tl.where(at == best, scores, 0.0), 0), shares)
    if RENORMALISE:
        shares = shares / (tl.sum(shares, 0) + 1e-20)
    shares = shares * scale
    tl.store(ids + row * K + slot, tl.where(is_bad, -1, chosen).to(tl.int64), mask=slot < K)
    tl.store(weights + row * K + slot, tl.where(is_bad, 0.0, shares), mask=slot < K)
    tl.store(bad + row, is_bad.to(tl.int32))


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
    """Ids (int64) and weights (fp32), [T, K], and which rows are none, int32 [T]. ``counted``: 0 = no groups."""
    num_rows, num_experts = logits_TE.shape
    device = logits_TE.device
    ids = torch.empty((num_rows, top_k), dtype=torch.int64, device=device)
    weights = torch.empty((num_rows, top_k), dtype=torch.float32, device=device)
    bad = torch.empty(num_rows, dtype=torch.int32, device=device)
    if num_rows:
        kernel: Any = gate_kernel[(num_rows,)]
        kernel(
            *(logits_TE, logits_TE if bias_E is None else bias_E, ids, weights, bad, logits_TE.stride(0), scale),
            *(num_experts, power_of_two(num_experts), top_k, bias_E is not None, sigmoid, renormalise),
            *(num_groups, num_kept, counted, power_of_two(top_k)),
            num_warps=1,
        )
    return ids, weights, bad
