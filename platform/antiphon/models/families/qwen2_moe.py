"""Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671): a shared expert behind a gate of its own beside the routed ones (control speed)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from antiphon.models.config import DecoderConfig, GateConfig, MoEConfig
from antiphon.models.families.dense import decoder, dense_ffn, grouped_attention
from antiphon.models.families.fields import activation
from antiphon.models.families.qwen2 import refuse_windows
from antiphon.models.families.sparse import mixed_layers, num_experts, qwen_sparse_layers

ARCHITECTURES = ("Qwen2MoeForCausalLM",)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    refuse_windows(raw)
    attention = grouped_attention(raw, qkv_bias=bool(raw.get("qkv_bias", True)))
    gate = GateConfig(
        num_experts=num_experts(raw),
        top_k=int(raw["num_experts_per_tok"]),
        renormalise=bool(raw.get("norm_topk_prob", False)),
    )
    moe = MoEConfig(
        gate=gate,
        intermediate_size=int(raw["moe_intermediate_size"]),
        activation=activation(raw),
        shared_intermediate_size=int(raw["shared_expert_intermediate_size"]),
        has_shared_gate=True,
    )
    return decoder(raw, "qwen2_moe", mixed_layers(qwen_sparse_layers(raw), attention, dense_ffn(raw), moe))
