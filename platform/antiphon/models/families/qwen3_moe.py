"""Qwen3-MoE (arXiv 2505.09388): RMSNorm per head on q and k, no shared expert (control speed)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from antiphon.models.config import DecoderConfig, GateConfig, MoEConfig
from antiphon.models.families.dense import decoder, dense_ffn, grouped_attention
from antiphon.models.families.fields import activation
from antiphon.models.families.qwen2 import refuse_windows
from antiphon.models.families.sparse import mixed_layers, num_experts, qwen_sparse_layers

ARCHITECTURES = ("Qwen3MoeForCausalLM",)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    refuse_windows(raw)
    bias = bool(raw.get("attention_bias", False))
    attention = grouped_attention(raw, qkv_bias=bias, output_bias=bias, qk_norm="head")
    gate = GateConfig(
        num_experts=num_experts(raw),
        top_k=int(raw["num_experts_per_tok"]),
        renormalise=bool(raw.get("norm_topk_prob", False)),
    )
    moe = MoEConfig(gate=gate, intermediate_size=int(raw["moe_intermediate_size"]), activation=activation(raw))
    return decoder(raw, "qwen3_moe", mixed_layers(qwen_sparse_layers(raw), attention, dense_ffn(raw), moe))
