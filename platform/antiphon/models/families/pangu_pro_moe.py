"""Pangu Pro MoE (arXiv 2505.21411): as many experts from every group, and a learned factor per expert (control speed)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from antiphon.models.config import DecoderConfig, GateConfig, MoEConfig
from antiphon.models.families.dense import decoder, dense_ffn, grouped_attention
from antiphon.models.families.fields import activation, refuse
from antiphon.models.families.sparse import mixed_layers, num_experts, qwen_sparse_layers

ARCHITECTURES = ("PanguProMoEForCausalLM",)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    refuse(raw, {"norm_topk_prob": False})
    if raw.get("rope_parameters") is None:
        _ = raw["rope_theta"]  # defaults differ between the programs that read such configs
    top_k = int(raw["num_experts_per_tok"])
    bias = bool(raw.get("qkv_bias", raw.get("attention_bias", True)))
    attention = grouped_attention(raw, qkv_bias=bias, output_bias=bool(raw.get("attention_bias", True)))
    gate = GateConfig(
        num_experts=num_experts(raw),
        top_k=top_k,
        choice="one_per_group_slot",
        num_groups=int(raw.get("num_groups") or top_k),
        has_expert_scale=True,
    )
    moe = MoEConfig(
        gate=gate,
        intermediate_size=int(raw["moe_intermediate_size"]),
        activation=activation(raw),
        shared_intermediate_size=int(raw["shared_expert_intermediate_size"]),
    )
    dense = dense_ffn(raw) if raw.get("intermediate_size") is not None else None
    layers = mixed_layers(qwen_sparse_layers(raw), attention, dense, moe)
    return decoder(raw, "pangu_pro_moe", layers, norm_eps=float(raw.get("rms_norm_eps", 1e-5)))
