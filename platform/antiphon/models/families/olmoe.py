"""OLMoE (arXiv 2409.02060): many small experts, norms over all of q and of k, optionally clipped q, k, v (control speed)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from antiphon.models.config import DecoderConfig, GateConfig, MoEConfig
from antiphon.models.families.dense import decoder, grouped_attention
from antiphon.models.families.fields import activation, refuse
from antiphon.models.families.sparse import mixed_layers, num_experts

ARCHITECTURES = ("OlmoeForCausalLM",)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    refuse(raw, {"attention_bias": False})
    clip = raw.get("clip_qkv")
    attention = replace(grouped_attention(raw, qk_norm="whole"), qkv_clip=None if clip is None else float(clip))
    gate = GateConfig(
        num_experts=num_experts(raw),
        top_k=int(raw["num_experts_per_tok"]),
        renormalise=bool(raw.get("norm_topk_prob", False)),
    )
    moe = MoEConfig(gate=gate, intermediate_size=int(raw["intermediate_size"]), activation=activation(raw))
    layers = mixed_layers([True] * int(raw["num_hidden_layers"]), attention, None, moe)
    return decoder(raw, "olmoe", layers, norm_eps=float(raw.get("rms_norm_eps", 1e-5)))
