"""Phi-3.5-MoE (arXiv 2404.14219): LayerNorms, biases, and the SparseMixer gate (arXiv 2409.12136) (control speed)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from antiphon.core.errors import UnsupportedModel
from antiphon.models.config import DecoderConfig, GateConfig, MoEConfig
from antiphon.models.families.dense import decoder, grouped_attention
from antiphon.models.families.fields import activation
from antiphon.models.families.sparse import MIXTRAL_NAMES, mixed_layers, num_experts

ARCHITECTURES = ("PhimoeForCausalLM", "PhiMoEForCausalLM")


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    _ = raw.get("input_jitter_noise")  # while training only
    if int(raw["num_experts_per_tok"]) != 2:
        raise UnsupportedModel("the SparseMixer gate chooses two experts", "num_experts_per_tok")
    bias, window = bool(raw.get("attention_bias", False)), raw.get("sliding_window")
    attention = grouped_attention(raw, qkv_bias=bias, output_bias=bias, default_theta=1e6)
    attention = replace(attention, sliding_window=int(window) if window else None)
    gate = GateConfig(
        num_experts=num_experts(raw), top_k=2, choice="sparse_mixer", mixer_jitter=float(raw.get("router_jitter_noise", 0.01))
    )
    moe = MoEConfig(gate=gate, intermediate_size=int(raw["intermediate_size"]), activation=activation(raw))
    layers = mixed_layers([True] * int(raw["num_hidden_layers"]), attention, None, moe, names=MIXTRAL_NAMES)
    return decoder(
        raw,
        "phimoe",
        layers,
        norm="layer",
        norm_eps=float(raw.get("rms_norm_eps", 1e-5)),
        lm_head_bias=bool(raw.get("lm_head_bias", False)),
    )
