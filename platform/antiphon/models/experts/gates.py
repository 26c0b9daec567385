"""Gates: from logits to (expert ids, weights), as pure functions (hot).

Each choice names its source; ``choose`` puts them together as a GateConfig says. Ids run over routed experts, then null experts,
then identity experts. Legend: T rows, E choices, K chosen per row, G groups. Must not know: weights of experts, shards.
"""

from __future__ import annotations

import torch

from antiphon.models.config import GateConfig

_TINY = 1e-20  # keeps 0 / 0 out of renormalisation


def choose(
    gate: GateConfig,
    logits_TE: torch.Tensor,
    correction_bias_E: torch.Tensor | None = None,
    expert_scale_E: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (int64) and weights (fp32) of the chosen experts, both [T, K], best first within a row or group.

    A row with NaN among its logits has NaN among its weights.
    """
    if gate.choice == "sparse_mixer":
        return sparse_mixer(logits_TE.float(), gate.mixer_jitter)
    scores_TE = torch.softmax(logits_TE.float(), dim=-1) if gate.scoring == "softmax" else torch.sigmoid(logits_TE.float())
    ranks_TE = scores_TE if correction_bias_E is None else scores_TE + correction_bias_E
    if gate.choice == "group_limited" and gate.num_groups > 1:
        ids_TK = group_limited(ranks_TE, gate.top_k, gate.num_groups, gate.num_kept_groups, gate.group_score)
    elif gate.choice == "one_per_group_slot":
        ids_TK = grouped(ranks_TE, gate.top_k, gate.num_groups)
    else:
        ids_TK = torch.topk(ranks_TE, gate.top_k, dim=-1).indices
    weights_TK = scores_TE.gather(1, ids_TK)
    if gate.num_null:
        weights_TK = weights_TK.masked_fill(is_null(gate, ids_TK), 0.0)
    if gate.renormalise:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + _TINY)
    if expert_scale_E is not None:
        weights_TK = weights_TK * expert_scale_E[ids_TK]
    if gate.scale != 1.0:
        weights_TK = weights_TK * gate.scale
    return ids_TK, weights_TK


def is_null(gate: GateConfig, ids_TK: torch.Tensor) -> torch.Tensor:
    """Where a null expert was chosen (AdaMoE, arXiv 2406.13233)."""
    return (ids_TK >= gate.num_experts) & (ids_TK < gate.num_experts + gate.num_null)


def is_identity(gate: GateConfig, ids_TK: torch.Tensor) -> torch.Tensor:
    """Where a zero-computation expert was chosen, which returns its row (LongCat-Flash, arXiv 2509.01322)."""
    return ids_TK >= gate.num_experts + gate.num_null


def group_limited(ranks_TE: torch.Tensor, top_k: int, num_groups: int, num_kept: int, group_score: str) -> torch.Tensor:
    """The K best experts out of the best groups; a group counts by its best expert (DeepSeek-V2, arXiv 2405.04434 §2.2.2)
    or by the sum of its two best (DeepSeek-V3, arXiv 2412.19437 §2.1.2).
    """
    num_rows, num_experts = ranks_TE.shape
    ranks_TGM = ranks_TE.view(num_rows, num_groups, num_experts // num_groups)
    counted = 1 if group_score == "max" else min(2, num_experts // num_groups)
    groups_TG = ranks_TGM.topk(counted, dim=-1).values.sum(dim=-1)
    kept = groups_TG.topk(num_kept, dim=-1).indices
    outside_TG = torch.ones_like(groups_TG, dtype=torch.bool).scatter_(1, kept, False)
    limited_TE = ranks_TGM.masked_fill(outside_TG[..., None], float("-inf")).view(num_rows, num_experts)
    return limited_TE.topk(top_k, dim=-1).indices


def grouped(ranks_TE: torch.Tensor, top_k: int, num_groups: int) -> torch.Tensor:
    """The K / G best experts of every group (MoGE, Pangu Pro MoE, arXiv 2505.21411 §2)."""
    num_rows, num_experts = ranks_TE.shape
    size = num_experts // num_groups
    best = ranks_TE.view(num_rows, num_groups, size).topk(top_k // num_groups, dim=-1).indices
    return (best + torch.arange(num_groups, device=best.device)[:, None] * size).view(num_rows, top_k)


def sparse_mixer(logits_TE: torch.Tensor, jitter: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two experts, one after the other, each weighted by a softmax over the logits near the best one left
    (SparseMixer-v2 at inference, arXiv 2409.12136 §2).
    """
    left_TE = logits_TE
    ids, weights = [], []
    for _ in range(2):
        best_T1, id_T1 = left_TE.max(dim=-1, keepdim=True)
        far_TE = (best_T1 - logits_TE) / logits_TE.abs().clamp(min=best_T1) > 2.0 * jitter
        weights.append(torch.softmax(left_TE.masked_fill(far_TE, float("-inf")), dim=-1).gather(1, id_T1))
        ids.append(id_T1)
        left_TE = left_TE.scatter(1, id_T1, float("-inf"))
    return torch.cat(ids, dim=1), torch.cat(weights, dim=1)
